"""Several workers: whole tasks each, or a part of every batch, over one worker.

    python tests/bench/workers.py --data CIFAR10 [--workers 2] [--json FILE]

Wall-clock seconds of learning the stream of the preset `split-cifar10` on a local Ray, with trunk
and features there already: starting the workers, and all tasks. Each way runs in processes and
under a name of its own. A ratio is over one worker on the same Ray.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import log, row, write

PARTIALHN = Path(sys.executable).with_name("partialhn")


def learn(arguments: argparse.Namespace, folder: Path, name: str, *options: str) -> dict:
    """`result.json` of a run in the folder, under a name of its own."""
    result = folder / f"{name}.json"
    words = [PARTIALHN, "train", "--preset", "split-cifar10", "--data", arguments.data,
             "--images-per-class", arguments.images, "--epochs", arguments.epochs, "--threads", "1",
             "--ray-address", "local", "--storage", folder / "store", "--name", name, "--result",
             result, *options]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True,
                          check=False)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=1500, help="of each class")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file that the rows go to")
    arguments = parser.parse_args()
    workers = str(arguments.workers)
    ways = {"one": (), "tasks": ("--workers", workers),
            "batches": ("--workers", workers, "--share", "batches")}
    found: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wanted = learn(arguments, folder, "before")["weights_hash"]
        for number in range(arguments.rounds):
            for way, options in ways.items():
                result = learn(arguments, folder, f"{way}-{number}", *options)
                assert way == "batches" or result["weights_hash"] == wanted, way
                found[way].append(result["seconds"]["stages"]["train"])
    best = {way: min(seconds) for way, seconds in found.items()}
    rows = [row(f"workers/{way}/{arguments.workers}", "one worker, the same Ray",
                best[way] / best["one"], None, median_ms=1e3 * best[way],
                baseline_ms=1e3 * best["one"]) for way in ("tasks", "batches")]
    for each in rows:
        log(each)
    write(arguments.json, rows)


if __name__ == "__main__":
    main()
