"""Trials per hour of a search whose trials share a process, against a process for each trial.

    python tests/bench/packing.py [--quick] [--json FILE]

Twelve trials of scikit-learn's digits at depth 3 and 4, one at a time, searched at random with
the same seed: the same trials both ways. The time runs from the first trial's end to the last's, so
what a search does once is no part of it. Wall-clock time; rounds alternate.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import log, row, write

SEARCH = """
import functools, sys
import ray.tune
made = ray.tune.TuneConfig
def config(**options):
    return made(**options | {"reuse_actors": sys.argv[1] == "shared"})
ray.tune.TuneConfig = config
from pipelines.cli.main import run
sys.exit(run(sys.argv[2:]))
"""
WORDS = shlex.split(
    "tune --name s --data digits --tasks 5 --input-size 16 --trunk-epochs 1 --epochs 1 --views 1 "
    "--depths 3 4 --budget 12-trials --seeds 1 --algorithm random --early-stopping none "
    "--trials-at-once 1 --threads 1 --output advice")


def trials_per_hour(how: str) -> float:
    """Of one search in a folder and a process of its own."""
    environment = {key: value for key, value in os.environ.items()
                   if key != "MLFLOW_TRACKING_URI"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", SEARCH, how, *WORDS], cwd=folder, check=False,
                              capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"the search failed:\n{done.stdout}{done.stderr}")
        advice = json.loads((Path(folder) / "advice" / "advice.json").read_text())
    ends = sorted(each["search_seconds"] for each in advice["trials"] if each["kind"] == "search")
    return 3600 * (len(ends) - 1) / (ends[-1] - ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that the row goes to")
    parser.add_argument("--quick", action="store_true", help="one round")
    arguments = parser.parse_args()
    pairs: list[tuple[float, float]] = []
    for _ in range(1 if arguments.quick else 3):
        pairs.append((trials_per_hour("shared"), trials_per_hour("own")))
        print("shared {:.0f}, a process each {:.0f} trials per hour".format(*pairs[-1]),
              flush=True)
    made = row("packing/trials-per-hour", "a process for each trial",
               statistics.median(shared / own for shared, own in pairs), 1.0, at_least=True,
               trials_per_hour=round(statistics.median(shared for shared, _ in pairs)),
               baseline_trials_per_hour=round(statistics.median(own for _, own in pairs)))
    log(made)
    write(arguments.json, [made])


if __name__ == "__main__":
    main()
