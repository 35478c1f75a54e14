"""The training loops: of the trunk on the first task, and of each experience on its features.

    for task t: strategy.begin(t)
        for epoch: for (z_BCHW, y_B): loss = cross_entropy + what the strategy adds; step
            yield EpochRecord(...)
        strategy.remember(t, features); strategy.finish(t)
        yield TaskRecord(accuracy on every task so far)

A loop yields records; saving, logging and reporting happen in the caller. Every random choice is
a function of (seed, task, epoch), so a loop that stopped after an epoch goes on as if it had not.

Legend: B batch, C channels, H W spatial, K classes, N images.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from partialhn.arithmetic import short_arithmetic
from partialhn.backbone import Network, tensors_below
from partialhn.batches import MappedBatches, ResidentBatches, Workers
from partialhn.config import Augment, BackboneConfig, TrainConfig
from partialhn.errors import InputError
from partialhn.inference_metrics import rejection_auroc, without_task_id
from partialhn.steps import (
    Objective,
    Recorder,
    Steps,
    learning_rates,
    make_optimiser,
    rate_factors,
)
from partialhn.store import FeatureSet
from partialhn.strategies import Strategy
from partialhn.task_inference import TaskInference, TaskStatistics, statistics
from partialhn.views import augment

RESIDENT_BYTES = 4 << 30
"""A task's features up to this many bytes are held in memory, on the device; of larger ones
batches are read from the mapped shards while the step before them is taken."""
TRUNK_WEIGHT_DECAY, TRUNK_LABEL_SMOOTHING = 0.05, 0.1
"""A trunk is trained once, on few classes, and must serve tasks it has not seen."""


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """One pass over one task's training images."""

    task: str
    task_index: int
    epoch: int
    """1 to epochs."""
    epochs: int
    loss: float
    cross_entropy: float
    regulariser: float
    """What the strategy adds to the loss."""
    accuracy: float
    """Share of training images answered right during the epoch."""
    validation_accuracy: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """One experience, finished."""

    task: str
    task_index: int
    accuracy_row: tuple[float, ...]
    """R[i, 0..i]: accuracy on the test images of every task so far."""
    train_seconds: float
    evaluate_seconds: float
    without_id: dict[str, float] | None = None
    """Where task inference is learned: rejection_auroc (how well this task's images were told
    from those of earlier ones before it was learned), and after the last task what
    `partialhn.inference_metrics.without_task_id` says."""


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


class Learner:
    """A strategy on its way through a stream, able to stop after any epoch and go on."""

    def __init__(self, strategy: Strategy, config: TrainConfig, device: torch.device | str = "cpu",
                 workers: Workers | None = None, inference: TaskInference | None = None,
                 recorder: Recorder | None = None) -> None:
        """`inference`: an empty one, to learn as well which task an image is of. `recorder`: as
        `fit_experience` takes it.
        """
        self.strategy, self.config = strategy.to(device), config
        self.inference, self.recorder = inference, recorder
        self.device = torch.device(device)
        self.workers = workers or Workers()
        self.epochs: list[EpochRecord] = []
        self.finished: list[TaskRecord] = []
        self._optimiser: torch.optim.Optimizer | None = None
        self.train_seconds = 0.0
        """Wall seconds that the task took which was trained last."""

    def learn(self, tasks: Sequence[TaskFeatures]) -> Iterator[EpochRecord | TaskRecord]:
        """Learns the tasks that are not finished yet, in order."""
        while len(self.finished) < len(tasks):
            yield from self.fit_next(tasks)
            yield self._conclude(tasks)

    def adopt(self, tasks: Sequence[TaskFeatures], owned: dict[str, Tensor],
              epochs: Sequence[EpochRecord], train_seconds: float,
              found: TaskStatistics | None = None) -> TaskRecord:
        """Takes the next task in as another learner has trained it (`fit_next`), and measures.

        owned: what `Strategy.owned` gave there. found: what `statistics` did, for a task whose
        training features are not here.
        """
        index = len(self.finished)
        self._make_room(tasks[index])
        self.strategy.take(index, owned)
        self.epochs += epochs
        self.train_seconds = train_seconds
        return self._conclude(tasks, found)

    def skip_to(self, tasks: Sequence[TaskFeatures], index: int) -> None:
        """Makes room for the tasks before `index`, which others learn: it is the next one.

        For strategies whose tasks are `independent`.
        """
        for task in tasks[len(self.finished):index]:
            self._make_room(task)
            self.finished.append(TaskRecord(task.name, len(self.finished), (), 0.0, 0.0))

    @property
    def epochs_done(self) -> int:
        """Finished epochs of the running experience."""
        return sum(record.task_index == len(self.finished) for record in self.epochs)

    def fit_next(self, tasks: Sequence[TaskFeatures]) -> Iterator[EpochRecord]:
        """Trains the next task, from where it was left, and measures nothing."""
        index = len(self.finished)
        task = tasks[index]
        if self._optimiser is None:
            self._begin(index, task.classes, task.refreshes)
        optimiser = cast(torch.optim.Optimizer, self._optimiser)
        self.strategy.revisit([(each.name, each.train) for each in tasks[:index]])
        for record in fit_experience(self.strategy, index, task, self.config, optimiser,
                                     epochs_done=self.epochs_done, workers=self.workers,
                                     recorder=self.recorder):
            self.epochs.append(record)
            yield record
        start = time.perf_counter()
        assert task.train is not None, f"task {task.name} has no training features"
        self.strategy.remember(index, task.train, (self.config.seed, index))
        self.strategy.finish(index)
        optimiser.zero_grad(set_to_none=True)
        self._optimiser = None
        self.train_seconds = time.perf_counter() - start + sum(
            record.seconds for record in self.epochs if record.task_index == index)

    def _make_room(self, task: TaskFeatures) -> None:
        self.strategy.add_task(task.classes, task.refreshes)
        self.strategy.to(self.device)
        self.strategy.finish(len(self.finished))

    def _conclude(self, tasks: Sequence[TaskFeatures],
                  found: TaskStatistics | None = None) -> TaskRecord:
        """Measures the task that was trained, and all before it."""
        index, start = len(self.finished), time.perf_counter()
        row = tuple(evaluate(self.strategy, j, tasks[j].test) for j in range(index + 1))
        without_id = self._learn_inference(tasks, index, found)
        self.finished.append(TaskRecord(tasks[index].name, index, row, self.train_seconds,
                                        time.perf_counter() - start, without_id))
        return self.finished[-1]

    def _learn_inference(self, tasks: Sequence[TaskFeatures], index: int,
                         found: TaskStatistics | None) -> dict[str, float] | None:
        """Takes in a finished task's features; what is measured of a task before and after."""
        if self.inference is None:
            return None
        train, tests = tasks[index].train, [task.test for task in tasks[:index + 1]]
        if found is None:
            assert train is not None, f"task {tasks[index].name} has no training features"
            found = statistics(train, index, self.config.seed)
        replaced = {task.refreshes for task in tasks[:index + 1]}
        measured = {}
        if index and tasks[index].refreshes is None:
            measured["rejection_auroc"] = rejection_auroc(self.inference, tests[:-1], tests[-1])
        self.inference.add_task(found)
        if index + 1 == len(tasks):
            measured |= without_task_id(self.strategy, self.inference, tests,
                                        [i for i in range(index + 1) if i not in replaced])
        return measured

    def _begin(self, index: int, classes: int, refreshes: int | None = None) -> None:
        if index == len(self.strategy.classes):
            self.strategy.add_task(classes, refreshes)
        self.strategy.to(self.device)
        self.strategy.begin(index)
        self._optimiser = make_optimiser(self.strategy, self.config)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that is needed to go on: tensors by name and a plain dict."""
        tensors = {f"strategy.{key}": value for key, value in self.strategy.state_dict().items()}
        if self._optimiser is not None:
            tensors |= {f"experience.{key}": value
                        for key, value in self.strategy.experience_state().items()}
            tensors |= optimiser_tensors(self._optimiser, self._trainable())
        if self.inference is not None:
            tensors |= {f"inference.{key}": value
                        for key, value in self.inference.tensors().items()}
        return tensors, {"classes": list(self.strategy.classes),
                         "epochs": [dataclasses.asdict(record) for record in self.epochs],
                         "finished": [dataclasses.asdict(record) for record in self.finished]}

    def restore(self, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        """Takes back `state` into a fresh learner of the same configuration."""
        for classes in fields["classes"]:
            self.strategy.add_task(classes)
        self.strategy.to(self.device)
        for index in range(len(fields["finished"])):
            self.strategy.finish(index)
        self.strategy.load_state_dict(tensors_below(tensors, "strategy."), strict=True)
        self.epochs = [EpochRecord(**record) for record in fields["epochs"]]
        self.finished = [TaskRecord(**record | {"accuracy_row": tuple(record["accuracy_row"])})
                         for record in fields["finished"]]
        if self.inference is not None:
            self.inference = TaskInference.from_tensors(tensors_below(tensors, "inference."),
                                                        len(self.finished))
        if len(self.finished) == len(self.strategy.classes):
            return
        self._begin(len(self.finished), self.strategy.classes[-1])
        self.strategy.restore_experience(
            {key: value.to(self.device)
             for key, value in tensors_below(tensors, "experience.").items()})
        if self.epochs_done:
            load_optimiser(cast(torch.optim.Optimizer, self._optimiser), self._trainable(),
                           tensors)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.strategy.named_parameters()
                if value.requires_grad]


def network_optimiser(network: Network, config: BackboneConfig) -> torch.optim.Optimizer:
    """AdamW over the whole network."""
    return torch.optim.AdamW([{"params": list(network.parameters()),
                               "peak": config.trunk_learning_rate}], fused=True,
                             weight_decay=TRUNK_WEIGHT_DECAY)


def optimiser_tensors(optimiser: torch.optim.Optimizer,
                      named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Adam's moments and step counts by parameter name."""
    return {f"optimiser.{key}.{name}": value for name, parameter in named
            for key, value in optimiser.state.get(parameter, {}).items()}


def load_optimiser(optimiser: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]],
                   tensors: dict[str, Tensor]) -> None:
    """Takes back `optimiser_tensors`; a parameter without a gradient so far has none."""
    for name, parameter in named:
        if f"optimiser.step.{name}" not in tensors:
            continue
        for key in ("step", "exp_avg", "exp_avg_sq"):
            saved = tensors[f"optimiser.{key}.{name}"].to(parameter.device)
            optimiser.state[parameter][key] = saved.clone()


def train_network(network: Network, images_NCHW: Tensor, y_N: Tensor, config: BackboneConfig,
                  kind: Augment, optimiser: torch.optim.Optimizer, *,
                  epochs_done: int = 0) -> Iterator[EpochRecord]:
    """Trains the whole network on the first task's images; its stages become the trunk.

    images_NCHW: uint8. Fresh augmentation each epoch, cosine learning rate; `optimiser` is
    `network_optimiser(network, config)`.
    """
    device = network.mean_C.device
    size = min(config.trunk_batch_size, len(y_N))
    steps = len(y_N) // size
    rates = rate_factors("cosine", steps * config.trunk_epochs)
    for epoch in range(epochs_done + 1, config.trunk_epochs + 1):
        start = time.perf_counter()
        network.train()
        order_N = np.random.default_rng([config.trunk_seed, epoch]).permutation(len(y_N))
        totals = torch.zeros(2, device=device)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * rates[(epoch - 1) * steps + step]
            rows_B = order_N[step * size:(step + 1) * size]
            images_BCHW = augment(images_NCHW[rows_B].to(device), rows_B, len(y_N), epoch, kind,
                                  config.trunk_seed)
            y_B = y_N[rows_B].to(device)
            with short_arithmetic(config.trunk_precision, device):
                logits_BK = network(images_BCHW).float()
            loss = nn.functional.cross_entropy(logits_BK, y_B,
                                               label_smoothing=TRUNK_LABEL_SMOOTHING)
            optimiser.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimiser.step()
            totals += torch.stack([loss.detach(), (logits_BK.argmax(1) == y_B).float().mean()])
        mean_loss, accuracy = (totals / steps).tolist()
        yield EpochRecord("trunk", -1, epoch, config.trunk_epochs, mean_loss, mean_loss, 0.0,
                          accuracy, None, time.perf_counter() - start)


def _resident(features: FeatureSet, device: torch.device) -> FeatureSet:
    """The features as one tensor on the device, where they fit; as they are otherwise."""
    return features.to(device) if features.nbytes <= RESIDENT_BYTES else features
