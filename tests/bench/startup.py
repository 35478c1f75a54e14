"""What MLflow, and Ray where it is asked for, cost a local run, over the same stream without.

    python tests/bench/startup.py [--quick] [--json FILE]

Seconds are wall-clock time: what a user waits. Runs of all kinds alternate, each in a process and
a folder of its own, and the median of the differences counts. The JSON has the processor time that
a run without Ray adds, too. The streams are scikit-learn's digits, upright and turned, as 2 or 20
tasks of two classes.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from rows import log, row, write
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


def seconds(words: list[object]) -> tuple[float, float]:
    """Wall-clock and processor time of a process in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start, before = time.perf_counter(), processor_time()
        done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True,
                              text=True, check=False, env=ENVIRONMENT)
        taken = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    return taken, processor_time() - before


def processor_time() -> float:
    """Of all processes below this one that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(config: Path, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of the run, of the same on a local Ray, and of the oracle, round by round."""
    train = [PARTIALHN, "train", "--config", config, "--name", "s"]
    ways = {"local-run": train, "local-ray": [*train, "--ray-address", "local"],
            "oracle": [sys.executable, "-c", ORACLE, config]}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, words in ways.items():
            found[way].append(seconds(words))
    return found


def added(found: dict[str, list[tuple[float, float]]], way: str, which: int = 0) -> float:
    """What a way adds to the oracle, in the median: of wall time, or (1) of processor time."""
    return statistics.median(run[which] - oracle[which] for run, oracle in
                             zip(found[way], found["oracle"], strict=True))


def wall_ms(runs: list[tuple[float, float]]) -> float:
    return 1e3 * statistics.median(wall for wall, _ in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that the rows go to")
    parser.add_argument("--quick", action="store_true", help="one round")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 5
    rows = []

    def tell(made: dict) -> None:
        rows.append(made)
        log(made)

    helped = statistics.median(seconds([PARTIALHN, "--help"])[0] for _ in range(2 * rounds + 1))
    tell(row("startup/help", f"{ALONE} s", helped / ALONE, 1.0, median_ms=1e3 * helped,
             baseline_ms=1e3 * ALONE))
    of = {}
    for tasks in (2, 20):
        with tempfile.TemporaryDirectory() as folder:
            found = measured(put_stream(Path(folder), tasks), rounds)
        of[tasks] = added(found, "local-run")
        for way, goal in (("local-run", 1.0), ("local-ray", None)):
            tell(row(f"startup/{way}/{tasks}-tasks", f"{ADDED:g} s over the one-process oracle",
                     added(found, way) / ADDED, goal, median_ms=wall_ms(found[way]),
                     baseline_ms=wall_ms(found["oracle"]),
                     **({"added_processor_s": round(added(found, way, 1), 1)} if goal else {})))
    tell(row("startup/per-task", "what is added for 2 tasks", of[20] / of[2], 2.0))
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
