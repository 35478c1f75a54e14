"""Steps a minute on this machine's device, recorded and not, against the floor of what they do.

    python tests/bench/device.py [--quick] [--device cuda|cpu] [--json FILE]

A task of 5,000 images, batch 64, stored features on the device. Milliseconds are wall-clock time,
the device waited for. The floor is the sum over a step's operations of the larger of two times: its
multiply-adds at the speed of a large matrix product of the same number type, and its inputs and
outputs at the speed of a large copy; both speeds are measured in the same run.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from pyarrow.fs import LocalFileSystem
from rows import clock, log, row, write
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from partialhn.config import BackboneConfig, Config, TrainConfig
from partialhn.features.batches import ResidentBatches, Workers
from partialhn.features.feature_set import FeatureSet
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import CutNetwork
from partialhn.networks.precision import configure_torch
from partialhn.run import cut_network
from partialhn.training.optimiser import learning_rates, make_optimiser
from partialhn.training.steps import Objective, Steps, recorder_for

IMAGES, CLASSES, VIEWS = 5000, 10, 2
A_MINUTE, OF_THE_FLOOR = 20_000, 0.6
NOTHING = ("empty", "_record_function")
"""How the names of operations begin that a device does nothing for."""
PRECISIONS = ("float32", "bfloat16")


class Floor(TorchDispatchMode):
    """Adds up what a step's operations need at least, given speeds of arithmetic and memory."""

    def __init__(self, macs_per_second: float, bytes_per_second: float) -> None:
        super().__init__()
        self.speeds, self.seconds, self.operations = (macs_per_second, bytes_per_second), 0.0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        if function.is_view or function.overloadpacket.__name__.startswith(NOTHING):
            return made
        tensors = {(each.data_ptr(), each.shape): each
                   for each in pytree.tree_leaves((args, kwargs, made))
                   if isinstance(each, torch.Tensor)}
        moved = sum(each.numel() * each.element_size() for each in tensors.values())
        count = flop_registry.get(function.overloadpacket)
        flops = count(*args, **kwargs or {}, out_val=made) if count else 0
        self.seconds += max(flops / 2 / self.speeds[0], moved / self.speeds[1])
        self.operations += 1
        return made


def per_second(work, amount: float, device: torch.device, rounds: int = 5) -> float:
    """The best of some rounds: what the device can do."""
    work()
    best = float("inf")
    for _ in range(rounds):
        start = clock(device)
        work()
        best = min(best, clock(device) - start)
    return amount / best


def speeds(device: torch.device, precision: str) -> tuple[float, float]:
    """Multiply-adds and bytes a second."""
    size, copied = (8192, 1 << 30) if device.type == "cuda" else (1024, 1 << 27)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a_XX, source = (torch.ones(size, size, device=device, dtype=dtype),
                    torch.ones(copied // 4, device=device))
    target = torch.empty_like(source)
    return (per_second(lambda: a_XX @ a_XX, size**3, device),
            per_second(lambda: target.copy_(source), 2 * copied, device))


def stored(depth: int, folder: Path) -> FeatureSet:
    """A task's features: what is in them does not matter for time."""
    network = build_network("slim_resnet18", CLASSES, 0).eval()
    trunk = CutNetwork.of(network, depth).trunk
    shape_CHW = trunk(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1:]
    store = FeatureStore(LocalFileSystem(), str(folder))
    recipe = FeatureRecipe("t", "d", "none", 32, VIEWS, "flip", depth, "float16", IMAGES)
    z_NVCHW = torch.rand(IMAGES, VIEWS, *shape_CHW)
    shard = store.write_shard(recipe, 0, z_NVCHW, np.arange(IMAGES) % CLASSES,
                              [str(row) for row in range(IMAGES)], seconds=0)
    return store.open(store.commit(recipe, [shard], (VIEWS, *shape_CHW)))


def prepared(features: FeatureSet, depth: int, precision: str, recorded: bool, steps: int):
    """A function that takes one step of a task after ten others, on the features' device."""
    device = features.y_N.device
    config = Config(backbone=BackboneConfig(freeze_depth=depth),
                    train=TrainConfig(precision=precision))
    strategy = cut_network(
        config, build_network("slim_resnet18", CLASSES, 0).eval()).strategy(config)
    for task in range(11):
        strategy.add_task(CLASSES)
        strategy.to(device)
        strategy.begin(task)
        if task < 10:
            strategy.finish(task)
    read = ResidentBatches(features, config.train.batch_size, Workers(),
                           as_stored=strategy.head.rounds)
    read.begin((0, 0, 1))
    optimiser = make_optimiser(strategy, config.train)
    taking = Steps(Objective(strategy.train(), 10, 0.0), optimiser,
                   learning_rates(optimiser, "cosine", steps).to(device),
                   recorder_for(device, recorded), read.steps_1)
    taken = [0]

    def take() -> None:
        if taken[0] and taken[0] % read.steps == 0:
            read.begin((0, 0, 1 + taken[0] // read.steps))
        taking.run_next(read)
        taken[0] += 1
    return take


def milliseconds(take, device: torch.device, rounds: int, steps: int) -> float:
    """Median over rounds of a step's time."""
    for _ in range(steps):
        take()
    found = []
    for _ in range(rounds):
        start = clock(device)
        for _ in range(steps):
            take()
        found.append(1e3 * (clock(device) - start) / steps)
    return statistics.median(found)


def measured(depth: int, precision: str, device: torch.device, rounds: int, steps: int):
    """The rows of one depth and precision."""
    name = f"{device.type}/depth{depth}/{precision}"
    goals = device.type == "cuda" and depth == 3
    configure_torch(1 if device.type == "cpu" else None)
    total = steps * (rounds + 1) + 1
    with tempfile.TemporaryDirectory() as folder:
        features = stored(depth, Path(folder)).to(device)
        take = prepared(features, depth, precision, False, total)
        taken = best = milliseconds(take, device, rounds, steps)
        floor = Floor(*speeds(device, precision))
        with floor:
            take()
        if device.type == "cuda":
            best = milliseconds(prepared(features, depth, precision, True, total), device, rounds,
                                steps)
            yield row(f"{name}/recorded", "the same steps, not recorded", best / taken, 1.0,
                      median_ms=best, baseline_ms=taken)
    yield row(f"{name}/floor", f"the floor of {floor.operations} operations",
              best / (1e3 * floor.seconds), 1 / OF_THE_FLOOR if goals else None, median_ms=best,
              baseline_ms=1e3 * floor.seconds, macs_per_second=floor.speeds[0],
              bytes_per_second=floor.speeds[1])
    yield row(f"{name}/a-minute", f"{A_MINUTE} steps a minute", 6e4 / best / A_MINUTE,
              1.0 if goals else None, at_least=True, median_ms=best, baseline_ms=6e4 / A_MINUTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=("cuda", "cpu"),
                        default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    rounds, steps = (3, 10) if options.device == "cpu" else (9, 500)
    if options.quick:
        rounds, steps = 3, max(3, steps // 5)
    rows = []
    for depth in (2, 3) if device.type == "cuda" else (3,):
        for precision in PRECISIONS:
            for made in measured(depth, precision, device, rounds, steps):
                rows.append(made)
                log(made)
    write(options.json, rows)


if __name__ == "__main__":
    main()
