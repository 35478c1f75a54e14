"""What starting Ray, MLflow and workers costs a local run, over the same stream in one process.

    python tests/bench/startup.py [--quick] [--json FILE]

Seconds are wall-clock time: what a user waits. Runs of both kinds alternate, each in a process and
a folder of its own, and the median of the differences counts. The streams are scikit-learn's
digits, upright and turned, as 2 or 20 tasks of two classes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from rows import row, say, write
from sklearn.datasets import load_digits

CONFIG = {
    "data": {"input_size": 16}, "backbone": {"freeze_depth": 3, "trunk_epochs": 1},
    "features": {"views": 1, "augment": "none"}, "train": {"epochs": 1, "batch_size": 16},
    "compute": {"threads": 1}}
PARTIALHN = Path(sys.executable).with_name("partialhn")
ORACLE = """
import sys
from pathlib import Path
from partialhn.config import load_config
from partialhn.run import run_stream
run_stream(load_config(sys.argv[1]), Path("oracle"))
"""
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
ALONE, ADDED = 0.5, 10.0
"""Seconds that the help text may take, and that a local run may add."""


def put_stream(folder: Path, tasks: int) -> Path:
    """A configuration, and beside it an image folder of two classes a task."""
    digits = load_digits()
    for label in range(2 * tasks):
        digit, turn = label % 10, label // 10
        pixels_NHW = (digits.images[digits.target == digit][:30] * 15.9).astype(np.uint8)
        for number, pixels_HW in enumerate(pixels_NHW):
            part = folder / "images" / ("train" if number % 3 else "test") / f"{label:02d}"
            part.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rot90(pixels_HW, turn)).save(part / f"{number}.png")
    path = folder / "config.yaml"
    data = CONFIG["data"] | {"data": str(folder / "images"), "tasks": tasks}
    path.write_text(yaml.safe_dump(CONFIG | {"data": data}))
    return path


def seconds(words: list[object]) -> float:
    """Wall-clock time of a process in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True,
                              text=True, check=False, env=ENVIRONMENT)
        taken = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    return taken


def added(config: Path, rounds: int) -> tuple[float, float, float]:
    """Median seconds of the run, of the oracle, and of what the run adds."""
    pairs = [(seconds([PARTIALHN, "train", "--config", config, "--name", "s"]),
              seconds([sys.executable, "-c", ORACLE, config])) for _ in range(rounds)]
    return (statistics.median(run for run, _ in pairs), statistics.median(o for _, o in pairs),
            statistics.median(run - oracle for run, oracle in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that the rows go to")
    parser.add_argument("--quick", action="store_true", help="one round")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 5
    rows = []

    def tell(made: dict) -> None:
        rows.append(made)
        say(made)

    helped = statistics.median(seconds([PARTIALHN, "--help"]) for _ in range(2 * rounds + 1))
    tell(row("startup/help", f"{ALONE} s", helped / ALONE, 1.0, median_ms=1e3 * helped,
             baseline_ms=1e3 * ALONE))
    of = {}
    for tasks in (2, 20):
        with tempfile.TemporaryDirectory() as folder:
            run, oracle, of[tasks] = added(put_stream(Path(folder), tasks), rounds)
        tell(row(f"startup/local-run/{tasks}-tasks", f"{ADDED:g} s over the one-process oracle",
                 of[tasks] / ADDED, 1.0, median_ms=1e3 * run, baseline_ms=1e3 * oracle))
    tell(row("startup/per-task", "what is added for 2 tasks", of[20] / of[2], 2.0))
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
