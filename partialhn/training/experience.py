"""The training loop of one experience on its stored features.

    for epoch: for (z_BCHW, y_B): loss = cross_entropy + what the strategy adds; step
        yield EpochRecord(...)

The loop yields records; saving, logging and reporting happen in the caller. Every random choice
is a function of (seed, task, epoch), so a loop that stopped after an epoch goes on as if it had
not.

Legend: B batch, C channels, H W spatial, K classes, N images.
"""

import dataclasses
import math
import time
from collections.abc import Iterator

import torch

from partialhn.config import TrainConfig
from partialhn.errors import InputError
from partialhn.features.batches import MappedBatches, ResidentBatches, Workers
from partialhn.features.feature_set import FeatureSet
from partialhn.strategies import Strategy
from partialhn.training.optimiser import learning_rates
from partialhn.training.records import EpochRecord
from partialhn.training.steps import Objective, Recorder, Steps

RESIDENT_BYTES = 4 << 30
"""A task's features up to this many bytes are held in memory, on the device; of larger ones
batches are read from the mapped shards while the step before them is taken."""


@dataclasses.dataclass(frozen=True)
class TaskFeatures:
    """One task's features in the three splits."""

    name: str
    classes: int
    train: FeatureSet | None
    """None for a task that is learned already and only tested."""
    validation: FeatureSet | None
    test: FeatureSet
    refreshes: int | None = None
    """The earlier slot of the same task that this one starts from."""


def fit_experience(strategy: Strategy, task_index: int, task: TaskFeatures, config: TrainConfig,
                   optimiser: torch.optim.Optimizer, *, epochs_done: int = 0,
                   workers: Workers | None = None,
                   recorder: Recorder | None = None) -> Iterator[EpochRecord]:
    """Trains one experience (section 3 of the paper), yielding a record per epoch.

    recorder: records a step and replays it, where one worker has the task's features on its device
    and the strategy's steps are all alike.
    """
    workers = workers or Workers()
    objective = workers.wrap(Objective(strategy, task_index, config.label_smoothing))
    device = strategy.weights(task_index).bias_K.device
    assert task.train is not None, f"task {task.name} has no training features"
    features = _resident(task.train, device)
    resident = features is not task.train
    read = (ResidentBatches(features, config.batch_size, workers) if resident
            else MappedBatches(features, config.batch_size, workers, device))
    rates_SG = learning_rates(optimiser, config.schedule, read.steps * config.epochs)
    alike = resident and workers.world == 1 and strategy.recordable
    steps = Steps(objective, optimiser, rates_SG[read.steps * epochs_done:].to(device),
                  recorder if alike else None)
    for epoch in range(epochs_done + 1, config.epochs + 1):
        start = time.perf_counter()
        strategy.train()
        seed = (config.seed, task_index, epoch)
        totals = steps.terms_3.zero_()
        read.begin(seed)
        for _ in range(read.steps):
            steps.take(read)
        mean = workers.add(totals / read.steps) / workers.world
        right = workers.add(torch.stack([totals[2],
                                         totals.new_tensor(read.steps * read.batch)]))
        seconds = time.perf_counter() - start
        cross_entropy, regulariser = mean[0].item(), mean[1].item()
        if not math.isfinite(cross_entropy + regulariser):
            raise InputError(f"the loss of task {task.name!r} became {cross_entropy + regulariser} "
                             f"in epoch {epoch}; allowed: a finite loss, so try a smaller "
                             f"learning_rate than {config.learning_rate}")
        validation = (None if task.validation is None or not len(task.validation)
                      else evaluate(strategy, task_index, task.validation))
        yield EpochRecord(task.name, task_index, epoch, config.epochs, cross_entropy + regulariser,
                          cross_entropy, regulariser, (right[0] / right[1]).item(), validation,
                          seconds)


@torch.no_grad()
def evaluate(strategy: Strategy, task_index: int, features: FeatureSet,
             batch_size: int = 256) -> float:
    """Accuracy on a split, on the plain view: weights generated once for all its images."""
    strategy.eval()
    weights = strategy.weights(task_index)
    device = weights.bias_K.device
    features = features if device.type == "cpu" else _resident(features, device)
    right = torch.zeros((), device=device)
    for rows_B in torch.split(torch.arange(len(features), device=features.y_N.device), batch_size):
        z_BCHW = features.gather(rows_B, torch.zeros_like(rows_B)).to(device)
        y_B = features.y_N[rows_B].to(device)
        right += (strategy.head(z_BCHW, weights).argmax(1) == y_B).sum()
    return right.item() / len(features)


def _resident(features: FeatureSet, device: torch.device) -> FeatureSet:
    """The features as one tensor on the device, where they fit; as they are otherwise."""
    return features.to(device) if features.nbytes <= RESIDENT_BYTES else features
