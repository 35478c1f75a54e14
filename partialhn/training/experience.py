"""The training loop of one experience on its stored features.

    for epoch: for (z_BCHW, y_B): loss = cross_entropy + the strategy's regulariser; step
        yield EpochRecord(...)

The loop yields records; the caller saves, logs and reports. Every random choice is a function of
(seed, task, epoch), so a loop that is resumed after any epoch gives the same result as one that
was never stopped.

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
from partialhn.training.steps import Objective, StepRecorder, Steps

RESIDENT_BYTES = 4 << 30
"""A task's features up to this many bytes are held in the device's memory. Batches of larger ones
are read from the mapped shards while the step before is computed."""


@dataclasses.dataclass(frozen=True)
class TaskFeatures:
    """One task's features in the three splits."""

    name: str
    classes: int
    train: FeatureSet | None
    """None for a task that is already learned and is only tested."""
    validation: FeatureSet | None
    test: FeatureSet
    refreshes: int | None = None
    """Index of the earlier slot of the same task, if this slot refreshes one."""


def fit_experience(strategy: Strategy, task_index: int, task: TaskFeatures, config: TrainConfig,
                   optimiser: torch.optim.Optimizer, *, epochs_done: int = 0,
                   workers: Workers | None = None,
                   recorder: StepRecorder | None = None) -> Iterator[EpochRecord]:
    """Trains one experience (section 3 of the paper); yields a record per epoch.

    recorder: records one step and replays it. It is used only if a single worker has the task's
    features on its device and all steps of the strategy run the same operations.

    A strategy in closed form takes no step: all of it is one epoch.

    Raises: InputError if the loss is no longer finite.
    """
    if strategy.closed_form:
        yield from [] if epochs_done else [solve_experience(strategy, task_index, task)]
        return
    workers = workers or Workers()
    objective = workers.data_parallel(Objective(strategy, task_index, config.label_smoothing))
    device = strategy.weights(task_index).bias_K.device
    assert task.train is not None, f"task {task.name} has no training features"
    features = _resident(task.train, device)
    resident = features is not task.train
    batches = (ResidentBatches(features, config.batch_size, workers) if resident
               else MappedBatches(features, config.batch_size, workers, device))
    rates_SG = learning_rates(optimiser, config.schedule, batches.steps * config.epochs)
    recordable = resident and workers.world == 1 and strategy.recordable
    steps = Steps(objective, optimiser, rates_SG[batches.steps * epochs_done:].to(device),
                  recorder if recordable else None)
    for epoch in range(epochs_done + 1, config.epochs + 1):
        start = time.perf_counter()
        strategy.train()
        seed = (config.seed, task_index, epoch)
        totals = steps.terms_3.zero_()
        batches.begin(seed)
        for _ in range(batches.steps):
            steps.run_next(batches)
        mean = workers.sum_over_workers(totals / batches.steps) / workers.world
        correct = workers.sum_over_workers(torch.stack(
            [totals[2], totals.new_tensor(batches.steps * batches.batch)]))
        seconds = time.perf_counter() - start
        cross_entropy, regulariser = mean[0].item(), mean[1].item()
        if not math.isfinite(cross_entropy + regulariser):
            raise InputError(f"the loss of task {task.name!r} became {cross_entropy + regulariser} "
                             f"in epoch {epoch}; allowed: a finite loss, so try a smaller "
                             f"learning_rate than {config.learning_rate}")
        yield EpochRecord(task.name, task_index, epoch, config.epochs, cross_entropy + regulariser,
                          cross_entropy, regulariser, (correct[0] / correct[1]).item(),
                          _validated(strategy, task_index, task), seconds)


def solve_experience(strategy: Strategy, task_index: int, task: TaskFeatures) -> EpochRecord:
    """Learns a task in closed form; the record has the loss and accuracy of its solution."""
    start = time.perf_counter()
    assert task.train is not None, f"task {task.name} has no training features"
    strategy.solve(task_index, task.train)
    seconds = time.perf_counter() - start
    loss, accuracy = measure(strategy, task_index, task.train)
    return EpochRecord(task.name, task_index, 1, 1, loss, loss, 0.0, accuracy,
                       _validated(strategy, task_index, task), seconds)


def _validated(strategy: Strategy, task_index: int, task: TaskFeatures) -> float | None:
    """Accuracy on the held-out images; None where there are none."""
    if task.validation is None or not len(task.validation):
        return None
    return evaluate(strategy, task_index, task.validation)


def evaluate(strategy: Strategy, task_index: int, features: FeatureSet) -> float:
    """Accuracy on a split, 0 to 1, on the plain view."""
    return measure(strategy, task_index, features)[1]


@torch.no_grad()
def measure(strategy: Strategy, task_index: int, features: FeatureSet,
            batch_size: int = 256) -> tuple[float, float]:
    """Cross-entropy and accuracy on the plain view of a split; the weights are generated once."""
    strategy.eval()
    weights = strategy.weights(task_index)
    device = weights.bias_K.device
    features = features if device.type == "cpu" else _resident(features, device)
    totals_2 = torch.zeros(2, device=device)
    for rows_B in torch.split(torch.arange(len(features), device=features.y_N.device), batch_size):
        z_BCHW = features.gather(rows_B, torch.zeros_like(rows_B)).to(device)
        y_B = features.y_N[rows_B].to(device)
        logits_BK = strategy.head(z_BCHW, weights)
        totals_2 += torch.stack([
            torch.nn.functional.cross_entropy(logits_BK, y_B, reduction="sum"),
            (logits_BK.argmax(1) == y_B).sum().float()])
    loss, correct = totals_2.tolist()
    return loss / len(features), correct / len(features)


def _resident(features: FeatureSet, device: torch.device) -> FeatureSet:
    """The features as one tensor on the device if they fit; otherwise unchanged."""
    return features.to(device) if features.nbytes <= RESIDENT_BYTES else features
