"""Tasks and trials at once on one device, against one after the other.

    python tests/bench/together.py [--device cuda|cpu] [--count N]

Steps of tasks of 5,000 images at depth 3, as `device.py` takes them; trials that learn two such
tasks. Each runs in a thread and, on a GPU, on a stream of its own.
"""

import argparse
import dataclasses
import tempfile
import threading
import time
from pathlib import Path

import device as steps_bench
import torch

from partialhn.config import BackboneConfig, Config, TrainConfig
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.backbone import build_network
from partialhn.networks.draws import ALONE
from partialhn.networks.precision import configure_torch
from partialhn.run import cut_network
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.steps import recorder_for
from partialhn.training.together import Lanes, Waiting


def seconds_of_steps(features: FeatureSet, precision: str, count: int, steps: int) -> float:
    """Seconds in which `count` tasks take `steps` steps each, at the same time."""
    device, begun, ended = features.y_N.device, [], []
    ready = threading.Barrier(count, timeout=300)

    def work() -> None:
        try:
            steps_of_one()
        except BaseException:
            ready.abort()  # the others must not wait for this one
            raise

    def steps_of_one() -> None:
        with ALONE:
            take = steps_bench.prepared(features, 3, precision, True, 3 * steps)
        for _ in range(steps):
            take()
        finish(device)
        ready.wait()
        begun.append(time.perf_counter())
        for _ in range(steps):
            take()
        finish(device)
        ended.append(time.perf_counter())

    with Lanes(count, device) as lanes:
        for _ in range(count):
            lanes.start(work)
        lanes.wait()
    return max(ended) - min(begun)


def finish(device: torch.device) -> None:
    """Waits for the work of this thread."""
    if device.type == "cuda":
        torch.cuda.current_stream().synchronize()


def seconds_of_trials(features: FeatureSet, device: torch.device, trials: int, count: int,
                      epochs: int) -> tuple[float, float]:
    """Wall-clock and processor seconds of some trials, `count` at once."""
    task = TaskFeatures("0", steps_bench.CLASSES, features, None, features)
    tasks = [task, dataclasses.replace(task, name="1")]
    network = build_network("slim_resnet18", steps_bench.CLASSES, 0).eval()

    def trial(seed: int) -> None:
        config = Config(backbone=BackboneConfig(freeze_depth=3),
                        train=TrainConfig(epochs=epochs, seed=seed))
        with ALONE:
            cut = cut_network(config, network)
        for _ in Learner(cut.strategy(config), config.train, device,
                         recorder=recorder_for(device, True)).learn(tasks):
            pass

    start, spent = time.perf_counter(), time.process_time()
    waiting = Waiting(range(trials), count)
    with Lanes(count, device) as lanes:
        for _ in range(count):
            lanes.start(lambda: waiting.work_off(trial))
        lanes.wait()
    return time.perf_counter() - start, time.process_time() - spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--count", type=int, default=8)
    options = parser.parse_args()
    device = torch.device(options.device)
    configure_torch(None if device.type == "cuda" else 1)
    steps = 400 if device.type == "cuda" else 5
    with tempfile.TemporaryDirectory() as folder:
        features = steps_bench.stored(3, Path(folder)).to(device)
        for count in sorted({1, 2, 4, options.count}):
            taken = seconds_of_steps(features, "bfloat16", count, steps)
            print(f"{count} at once: {60 * count * steps / taken:,.0f} steps a minute", flush=True)


if __name__ == "__main__":
    main()
