"""Makes `stream-0.1.0.tar.xz`: two small streams as a given version of the product left them.

    git worktree add OLD 4084f75; cd OLD; make setup
    .venv/bin/python THIS/tests/compatibility/make_fixture.py TARGET.tar.xz

`trained` was begun by `partialhn train`, `retrained` by `partialhn retrain`. It is run by hand,
with the old version installed, and never again for the same version: the archive is the fixture.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

ROOT = "@ROOT@"
"""Stands in the registry's database for the folder that the streams lie in."""
IMAGES = 24


def put_task(folder: Path, labels: tuple[int, int]) -> None:
    """Two digits as image folders of 8x8 PNGs, a third of them for testing."""
    digits = load_digits()
    for label in labels:
        pixels_NHW = (digits.images[digits.target == label] * 15.9).astype(np.uint8)
        for number in range(IMAGES):
            part = folder / ("test" if number % 3 == 0 else "train") / str(label)
            part.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_NHW[number]).save(part / f"{number:03d}.png")


def write_trunk(path: Path, build_network) -> None:
    """A supplied network whose weights are rounded to sixteenths, so that the archive is small."""
    torch.manual_seed(0)
    state = build_network("slim_resnet18", 2).state_dict()
    save_file({key: (value * 16).round() / 16 if value.is_floating_point() else value
               for key, value in state.items()}, path)


def run(folder: Path, *words: str) -> None:
    command = "import sys; from pipelines.cli.main import main; main(sys.argv[1:])"
    subprocess.run([sys.executable, "-c", command, *words], cwd=folder, check=True)


def main(target: Path) -> None:
    try:
        from partialhn.backbone import build_network  # 0.1.0 before the folders
    except ModuleNotFoundError:
        from partialhn.networks.backbone import build_network
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch).resolve() / "old"
        root.mkdir()
        write_trunk(root / "trunk.safetensors", build_network)
        for task, labels in (("a", (0, 1)), ("b", (2, 3))):
            put_task(root / "tasks" / task, labels)
            put_task(root / "retrained" / "inbox" / task, labels)
            (root / "retrained" / "inbox" / task / "_READY").write_text("")
        config = {
            "data": {"data": "tasks", "input_size": 8},
            "backbone": {"freeze_depth": 3, "trunk": "trunk.safetensors"},
            "features": {"views": 2, "augment": "crop"}, "hypernet": {"fresh_columns": 4},
            "train": {"epochs": 3, "batch_size": 16}, "compute": {"threads": 1}}
        (root / "trained.yaml").write_text(json.dumps(config))
        config["data"] = {"input_size": 8}
        config["backbone"] = {"freeze_depth": 4, "trunk": "trunk.safetensors"}
        (root / "retrained.yaml").write_text(json.dumps(config))
        (root / "policy.yaml").write_text(json.dumps({
            "min_above_chance": 0.01, "max_p_value": 1.0, "min_against_linear_probe": -1.0,
            "inbox": {"min_test_images": 4}}))
        run(root, "train", "--config", "trained.yaml", "--name", "trained", "--storage", "trained")
        run(root, "retrain", "--config", "retrained.yaml", "--name", "retrained", "--storage",
            "retrained", "--policy", "policy.yaml")
        hide_root(root)
        with tarfile.open(target, "w:xz", preset=9) as archive:
            archive.add(root, "old")


def hide_root(root: Path) -> None:
    """Absolute paths in the databases become `ROOT`: a test puts its own folder there."""
    import sqlite3

    for database in root.glob("*/mlflow.db"):
        with sqlite3.connect(database) as connection:
            replace_in(connection, str(root), ROOT)
        connection.close()


def replace_in(connection, old: str, new: str) -> None:
    tables = [name for (name,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'")]
    for table in tables:
        for _, column, kind, *_ in connection.execute(f"PRAGMA table_info('{table}')").fetchall():
            if kind.upper().startswith(("VARCHAR", "TEXT", "CLOB")):
                connection.execute(f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) '
                                   f'WHERE "{column}" LIKE ?', (old, new, f"%{old}%"))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
