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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from partialhn.config import TrainConfig
from partialhn.errors import DivergedError
from partialhn.features.batches import MappedBatches, ResidentBatches, Workers
from partialhn.features.closed_form import accuracy
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.precision import wait_for
from partialhn.strategies import Strategy
from partialhn.training.answers import answer, resident
from partialhn.training.budget import BestState, Budget, held_out_loss, task_budget
from partialhn.training.choice import can_choose, few_images, is_chosen, seen, solve, take
from partialhn.training.optimiser import learning_rates
from partialhn.training.records import EpochRecord
from partialhn.training.refit import average_with_ridge, start_at_ridge
from partialhn.training.steps import Objective, StepRecorder, Steps


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
    names: tuple[str, ...] = ()
    """Names of the classes, where they are known."""


def fit_experience(strategy: Strategy, task_index: int, task: TaskFeatures, config: TrainConfig,
                   optimiser: torch.optim.Optimizer, *, done: Sequence[EpochRecord] = (),
                   best: BestState | None = None, workers: Workers | None = None,
                   recorder: StepRecorder | None = None) -> Iterator[EpochRecord]:
    """Trains one experience (section 3 of the paper); yields a record per epoch.

    A strategy in closed form takes no step: all of it is one epoch. Where passes are not given,
    training stops by the held-out loss, the strategy ends in its best state, and a last record says
    whether ridge regression took its place (`partialhn.training.choice`).

    done: the records so far of an experience that goes on. best: its best state. recorder: records
    one step and replays it. It is used only if a single worker has the task's features on its
    device and all steps of the strategy run the same operations.

    Raises: DivergedError if the loss is no longer finite.
    """
    assert task.train is not None, f"task {task.name} has no training features"
    chosen = is_chosen(strategy, config)
    if strategy.closed_form or (chosen and few_images(task.train, task.validation, task.classes)):
        yield from [] if done else [solve_experience(strategy, task_index, task)]
        return
    if done and done[-1].ridge_accuracy is not None:
        return
    epochs_done = len(done)
    start = time.perf_counter()
    if strategy.head.keeps_statistics and not done:
        start_at_ridge(strategy, task_index, task.train)
    workers, best = workers or Workers(), best or BestState()
    budget = budget_of(strategy, task, config)
    run = _Run(strategy, task_index, task, config, optimiser, budget, workers, recorder,
               epochs_done, start)
    for epoch in range(epochs_done + 1, budget.epochs + 1):
        if budget.patience is not None and budget.is_over(best.losses):
            break
        record = run.epoch(epoch)
        if record.held_out_loss is not None:
            best.add(record.held_out_loss, strategy.task_state(task_index))
        run.records.append(record)
        yield record
    if best.tensors:
        strategy.load_task_state(task_index, best.tensors)
    held_out = task.validation
    if chosen and can_choose(held_out):
        average_with_ridge(strategy, task_index, task.train, held_out)
        yield _choose(strategy, task_index, task, held_out, [*done, *run.records][-1])


def budget_of(strategy: Strategy, task: TaskFeatures, config: TrainConfig) -> Budget:
    """The budget of a task.

    Held-out images of the new task do not show what a shared head still knows of earlier ones, so
    only a strategy whose tasks are independent stops by them.
    """
    assert task.train is not None, f"task {task.name} has no training features"
    held_out = 0 if task.validation is None or not strategy.independent else len(task.validation)
    return task_budget(config, len(task.train), held_out)


class _Run:
    """The epochs of one experience."""

    def __init__(self, strategy: Strategy, task_index: int, task: TaskFeatures,
                 config: TrainConfig, optimiser: torch.optim.Optimizer, budget: Budget,
                 workers: Workers, recorder: StepRecorder | None, epochs_done: int,
                 start: float) -> None:
        """start: when the work began that the first of these epochs is to account for."""
        self._start: float | None = start
        self.strategy, self.task_index, self.task, self.config = strategy, task_index, task, config
        self.budget, self.workers = budget, workers
        self.records: list[EpochRecord] = []
        objective = workers.data_parallel(Objective(strategy, task_index, config.label_smoothing))
        device = strategy.weights(task_index).bias_K.device
        assert task.train is not None
        features = resident(task.train, device)
        is_resident = features is not task.train
        self.held_out = task.validation
        if task.validation is not None and device.type != "cpu":
            self.held_out = resident(task.validation, device)  # once, not at every measurement
        self.batches = (
            ResidentBatches(features, config.batch_size, workers, budget.passes,
                            as_stored=strategy.head.rounds) if is_resident
            else MappedBatches(features, config.batch_size, workers, device, budget.passes))
        rates_SG = learning_rates(optimiser, config.schedule, self.batches.steps * budget.epochs)
        recordable = is_resident and workers.world == 1 and strategy.recordable
        self.steps = Steps(objective, optimiser,
                           rates_SG[self.batches.steps * epochs_done:].to(device),
                           recorder if recordable else None, self.batches.steps_1)

    def epoch(self, epoch: int) -> EpochRecord:
        """Runs the steps of one epoch. Raises: DivergedError if the loss is no longer finite."""
        start, self._start = self._start or time.perf_counter(), None
        batches, workers = self.batches, self.workers
        self.strategy.train()
        totals = self.steps.terms_3.zero_()
        batches.begin((self.config.seed, self.task_index, epoch))
        for _ in range(batches.steps):
            self.steps.run_next(batches)
        mean = workers.sum_over_workers(totals / batches.steps) / workers.world
        correct = workers.sum_over_workers(torch.stack(
            [totals[1], totals.new_tensor(batches.steps * batches.batch)]))
        wait_for(mean.device)
        seconds = time.perf_counter() - start
        cross_entropy, regulariser = mean[0].item(), mean[2].item()
        if not math.isfinite(cross_entropy + regulariser):
            raise DivergedError(f"the loss of task {self.task.name!r} became "
                                f"{cross_entropy + regulariser} in epoch {epoch}; allowed: a "
                                "finite loss, so try a smaller learning_rate than "
                                f"{self.config.learning_rate}", self.task.name)
        loss, validation = _validated(self.strategy, self.task_index, self.held_out)
        if self.budget.patience is None:
            loss = None
        elif loss is not None and workers.world > 1:  # all workers must stop alike
            own = totals.new_tensor(loss if workers.rank == 0 else 0.0, dtype=torch.float64)
            loss = workers.sum_over_workers(own).item()
        return EpochRecord(self.task.name, self.task_index, epoch, self.budget.epochs,
                           cross_entropy + regulariser, cross_entropy, regulariser,
                           (correct[0] / correct[1]).item(), validation, seconds, loss,
                           self.budget.passes, self._ridge(epoch))

    def _ridge(self, epoch: int) -> float | None:
        """Held-out accuracy of ridge regression after the last epoch, where it may not be chosen
        and so only shows what the training is worth.
        """
        held_out, strategy = self.task.validation, self.strategy
        if (epoch < self.budget.epochs or not strategy.takes_linear
                or is_chosen(strategy, self.config) or not can_choose(held_out)):
            return None
        return accuracy(_ridge_logits(strategy, self.task, held_out), held_out.y_N.cpu())


def solve_experience(strategy: Strategy, task_index: int, task: TaskFeatures) -> EpochRecord:
    """Learns a task in closed form; the record has the loss and accuracy of its solution.

    A strategy that trains otherwise takes ridge regression on all images, held-out ones included;
    the held-out accuracy is then that of leave-one-out.
    """
    start, ridge = time.perf_counter(), None
    assert task.train is not None, f"task {task.name} has no training features"
    if strategy.closed_form:
        strategy.solve(task_index, task.train)
    else:
        solved = solve(strategy, _all_sets(task), task.classes)
        take(strategy, task_index, solved)
        ridge = solved.left_out_accuracy
    seconds = time.perf_counter() - start
    logits_NK, y_N = answer(strategy, task_index, task.train)
    loss = torch.nn.functional.cross_entropy(logits_NK, y_N).item()
    held_out = _validated(strategy, task_index, task.validation)[1] if ridge is None else ridge
    return EpochRecord(task.name, task_index, 1, 1, loss, loss, 0.0, accuracy(logits_NK, y_N),
                       held_out, seconds, passes=0, ridge_accuracy=ridge, solved=ridge is not None)


def unseen_logits(strategy: Strategy, task_index: int, task: TaskFeatures, *,
                  solved: bool) -> Tensor | None:
    """logits_NK of a task's held-out images by a head that has not learned from them, float32 on
    the CPU; None without such images.

    solved: the task's head is ridge regression on all images, held-out ones included. Then each of
    them is answered by the solution of all others.
    """
    assert task.train is not None, f"task {task.name} has no training features"
    if task.validation is None or not len(task.validation):
        return None
    if not solved:
        return answer(strategy, task_index, task.validation)[0].float()
    found = solve(strategy, _all_sets(task), task.classes)
    return found.classifier.left_out_NK[len(task.train):].float()


def _choose(strategy: Strategy, task_index: int, task: TaskFeatures, held_out: FeatureSet,
            last: EpochRecord) -> EpochRecord:
    """Lets ridge regression replace a trained head where its held-out loss is smaller.

    It is judged without the held-out images, and then fitted to them too. The losses decide, and
    not the numbers of correct answers: these change by luck where few images are held out.
    """
    start = time.perf_counter()
    y_N = held_out.y_N.cpu()
    ridge_NK = _ridge_logits(strategy, task, held_out)
    trained_NK = answer(strategy, task_index, held_out)[0]
    solved = held_out_loss(ridge_NK, y_N) < held_out_loss(trained_NK, y_N)
    if solved:
        take(strategy, task_index, solve(strategy, _all_sets(task), task.classes))
    return dataclasses.replace(
        last, epoch=last.epoch + 1, epochs=last.epoch + 1,
        validation_accuracy=accuracy(ridge_NK if solved else trained_NK, y_N),
        seconds=time.perf_counter() - start, passes=0, held_out_loss=None,
        ridge_accuracy=accuracy(ridge_NK, y_N), solved=solved)


def _ridge_logits(strategy: Strategy, task: TaskFeatures, held_out: FeatureSet) -> Tensor:
    """logits_NK of held-out images by ridge regression on the training images."""
    assert task.train is not None, f"task {task.name} has no training features"
    solved = solve(strategy, [task.train], task.classes)
    return solved.classifier.logits(seen(strategy, [held_out], solved.side, solved.blocks))


def _all_sets(task: TaskFeatures) -> list[FeatureSet]:
    """The images of a task that are not for testing."""
    return [features for features in (task.train, task.validation)
            if features is not None and len(features)]


def _validated(strategy: Strategy, task_index: int, held_out: FeatureSet | None
               ) -> tuple[float | None, float | None]:
    """`held_out_loss` and accuracy on the held-out images; None where there are none."""
    if held_out is None or not len(held_out):
        return None, None
    logits_NK, y_N = answer(strategy, task_index, held_out)
    return held_out_loss(logits_NK, y_N), accuracy(logits_NK, y_N)
