"""A year of a stream in one sitting: 24 tasks over real images arrive, one after the other.

    PARTIALHN_TEST_DATA=DATA python tests/golden/year.py --folder year --output year.json

Pieces of Tiny-ImageNet (10 classes) and of CIFAR-10 (2 classes) arrive in the inbox, and a pass
runs after each as a scheduler would start it (in one process, as --watch does).
One task is poisoned: its labels are shuffled. Once a person rolls the champion back. One old task
gets more data. Writes the seconds and bytes of every pass, the history, and what the gate said.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from pipelines.registry.history import Move
from pipelines.retrain.run import retrain
from pipelines.settings import RetrainConfig

CONFIG = {
    "data": {"data": "inbox", "input_size": 32}, "hypernet": {"fresh_columns": 8},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 6},
    "features": {"views": 2, "shard_rows": 2048}, "train": {"epochs": 3},
    "compute": {"threads": 1}}
POLICY = {"max_loss_on_earlier_task": 0.02, "min_above_chance": 0.05}
POISONED, ROLLED_BACK, REFRESHED = 9, 14, 20
"""The task of this number is poisoned; after it the champion goes back; before it one grows."""


class Pieces:
    """24 tasks cut from the data sets: every third one is a pair of CIFAR-10 classes."""

    def __init__(self, data: Path, images: int) -> None:
        self.data, self.images = data, images
        self._tables: dict[Path, pa.Table] = {}

    def classes(self, task: int) -> tuple[str, list[int]]:
        """Which data set, and the labels in it; the first task is of the harder one."""
        if task % 5 == 4:
            pair = task // 5
            return "cifar10", [2 * pair, 2 * pair + 1]
        tiny = task - task // 5
        return "tiny-imagenet-32", list(range(10 * tiny, 10 * tiny + 10))

    def write(self, folder: Path, task: int, *, part: int = 0, seed: int | None = None) -> None:
        """Writes train.parquet and test.parquet; `part` 1 takes the images after those of 0."""
        name, labels = self.classes(task)
        rng = np.random.default_rng(seed)
        for split, count in (("train", self.images), ("test", 25)):
            rows = []
            for new, label in enumerate(labels):
                images = self._images(name, split, label)
                for image in images[part * count:(part + 1) * count]:
                    shown = new if seed is None else int(rng.integers(len(labels)))
                    rows.append({"image": {"bytes": image, "path": ""}, "label": shown})
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{split}.parquet")
        (folder / "_READY").write_text("")

    def _images(self, name: str, split: str, label: int) -> list[bytes]:
        for path in sorted((self.data / name).glob(f"{split}*.parquet")):
            if path not in self._tables:
                self._tables[path] = pq.read_table(path)
            table = self._tables[path]
            found = table.filter(pa.compute.equal(table["label"], label))
            if len(found):
                return [row["bytes"] for row in found["image"].to_pylist()]
        raise SystemExit(f"no {split} image of class {label} below {self.data / name}")


def year(folder: Path, data: Path, tasks: int, images: int) -> dict:
    """Lives the year; returns what is written."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    storage, pieces, rows = open_storage(str(folder / "store")), Pieces(data, images), []
    settings = RetrainConfig("year", str(folder / "store"), policy=str(folder / "policy.yaml"),
                             config=str(folder / "config.yaml"))
    inbox = folder / "store" / "inbox"

    def one_pass(event: str) -> None:
        begun, before = time.monotonic(), size(folder / "store")
        done = retrain(settings, lambda line: None)
        rows.append({"event": event, "seconds": round(time.monotonic() - begun, 2),
                     "stages": done.seconds, "exit_code": done.exit_code,
                     "champion": done.champion, "learned": done.learned,
                     "stored_bytes": size(folder / "store") - before})
        print(json.dumps({key: rows[-1][key] for key in ("event", "seconds", "exit_code",
                                                         "champion", "stored_bytes")}))

    for task in range(tasks):
        if task == REFRESHED:
            pieces.write(inbox / "task-01" / "2026-11", 1, part=1)
            one_pass("task-01/2026-11")
        pieces.write(inbox / f"task-{task:02d}", task, seed=1 if task == POISONED else None)
        one_pass(f"task-{task:02d}" + (" (poisoned)" if task == POISONED else ""))
        if task == ROLLED_BACK:
            one_pass("nothing new")
            champion = rows[-1]["champion"]
            connect(storage).aliases.move("year", Move("champion", champion - 1, "rollback",
                                                       f"version {champion} is not wanted"))
            one_pass("after a rollback")
    registry = connect(storage)
    result = registry.result("year")
    history = [entry.fields() | {"decision": None}
               for entry in registry.aliases.history("year").entries()]
    return {"config": CONFIG, "policy": POLICY, "images_per_class": images, "passes": rows,
            "history": history, "tasks": [task["name"] for task in result["tasks"]],
            **{key: result[key] for key in ("acc", "learning_accuracy", "forgetting",
                                            "accuracy_matrix", "weights_hash", "versions")}}


def size(folder: Path) -> int:
    """Bytes of what the product stored: the inbox is not its own."""
    return sum(path.stat().st_size for path in folder.rglob("*")
               if path.is_file() and "inbox" not in path.relative_to(folder).parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--images", type=int, default=100, help="training images of a class")
    given = parser.parse_args()
    data = os.environ.get("PARTIALHN_TEST_DATA")
    if not data:
        raise SystemExit("PARTIALHN_TEST_DATA names no folder of test images")
    found = year(given.folder, Path(data), given.tasks, given.images)
    given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
