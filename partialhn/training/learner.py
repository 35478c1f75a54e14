"""The learner: takes a strategy through a stream of tasks.

for task t: strategy.begin(t)
for epoch record of `fit_experience`: yield it
strategy.after_experience(t, features); strategy.finish(t)
yield TaskRecord(accuracy on every task so far)
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from partialhn.config import TrainConfig
from partialhn.data.experience import newest_slots
from partialhn.detector.detector import Detector
from partialhn.evaluation.task_inference_metrics import rejection_auroc, without_task_id
from partialhn.features.batches import Workers
from partialhn.networks.device_memory import explained
from partialhn.networks.tensors import tensors_below
from partialhn.strategies import Strategy
from partialhn.task_inference import Inference, LearnedTask, add_measured, measure, stored_inference
from partialhn.training.budget import BestState
from partialhn.training.experience import TaskFeatures, fit_experience, unseen_logits
from partialhn.training.measured import accuracy_row
from partialhn.training.optimiser import (
    load_optimiser,
    make_optimiser,
    optimiser_tensors,
)
from partialhn.training.records import (
    EpochRecord,
    TaskRecord,
    fields_of,
    is_measured_after,
)
from partialhn.training.steps import StepRecorder

MORE_ROOM = ("fewer views, a deeper freeze_depth, feature_dtype int8, or a device with more "
             "memory")
"""What a user can do where a task's features need more memory than the device has."""


class Learner:
    """Takes a strategy through a stream of tasks; can be stopped and resumed after any epoch."""

    def __init__(self, strategy: Strategy, config: TrainConfig, device: torch.device | str = "cpu",
                 workers: Workers | None = None, inference: Detector | None = None,
                 recorder: StepRecorder | None = None, *, re_evaluate: bool = False) -> None:
        """`inference`: an empty detector, if task inference is to be learned too.

        `recorder`: as in `fit_experience`. `re_evaluate`: measure earlier tasks again, although
        they cannot have changed.
        """
        self.strategy, self.config = strategy.to(device), config
        self.inference: Inference | None = inference
        self.recorder, self.re_evaluate = recorder, re_evaluate
        self.device = torch.device(device)
        self.workers = workers or Workers()
        self.epochs: list[EpochRecord] = []
        self.finished: list[TaskRecord] = []
        self._grounds: list[str | None] = []
        """The grounds of the tasks' accuracies (`partialhn.training.measured`)."""
        self._optimiser: torch.optim.Optimizer | None = None
        self._best = BestState()
        """The best state of the running experience."""
        self.train_seconds = 0.0
        """Wall seconds that the training of the last task took."""

    def learn(self, tasks: Sequence[TaskFeatures]) -> Iterator[EpochRecord | TaskRecord]:
        """Learns the tasks that are not finished yet, in order."""
        while len(self.finished) < len(tasks):
            yield from self.learn_next(tasks)

    def learn_next(self, tasks: Sequence[TaskFeatures]) -> Iterator[EpochRecord | TaskRecord]:
        """Learns the next task, and measures it and all before it."""
        yield from self.fit_next(tasks)
        yield self._conclude(tasks)

    def load_task_state(self, tasks: Sequence[TaskFeatures], task_state: dict[str, Tensor],
                        epochs: Sequence[EpochRecord], train_seconds: float,
                        measured: dict[str, Tensor] | None = None) -> TaskRecord:
        """Loads the next task as another learner trained it (with `fit_next`), and measures it.

        task_state: the other learner's `Strategy.task_state`. measured: the result of
        `measure_task`, needed if the task's training features are not in `tasks`.
        """
        index = len(self.finished)
        self._add_task(tasks[index])
        self.strategy.load_task_state(index, task_state)
        self.epochs += epochs
        self.train_seconds = train_seconds
        return self._conclude(tasks, measured)

    def skip_to(self, tasks: Sequence[TaskFeatures], index: int) -> None:
        """Adds the tasks before `index`, which other learners train, without learning them.

        Task `index` is then the next one. Only for strategies whose tasks are `independent`.
        """
        for task in tasks[len(self.finished):index]:
            self._add_task(task)
            self.finished.append(TaskRecord(task.name, len(self.finished), (), 0.0, 0.0))

    @property
    def epochs_done(self) -> int:
        """Number of finished epochs of the running experience."""
        return sum(record.task_index == len(self.finished) for record in self.epochs)

    def fit_next(self, tasks: Sequence[TaskFeatures]) -> Iterator[EpochRecord]:
        """Trains the next task, from its last finished epoch on; measures no test accuracy.

        Raises: DeviceMemoryError if the device's memory does not suffice.
        """
        with explained(*self._memory_of(tasks[len(self.finished)])):
            yield from self._fit_next(tasks)

    def _fit_next(self, tasks: Sequence[TaskFeatures]) -> Iterator[EpochRecord]:
        index = len(self.finished)
        task = tasks[index]
        if self._optimiser is None:
            self._begin(index, task.classes, task.refreshes)
        optimiser = cast(torch.optim.Optimizer, self._optimiser)
        self.strategy.before_experience([(earlier.name, earlier.train)
                                         for earlier in tasks[:index]])
        for record in fit_experience(self.strategy, index, task, self.config, optimiser,
                                     done=self.epochs[len(self.epochs) - self.epochs_done:],
                                     best=self._best,
                                     workers=self.workers, recorder=self.recorder):
            self.epochs.append(record)
            yield record
        start = time.perf_counter()
        assert task.train is not None, f"task {task.name} has no training features"
        self.strategy.after_experience(index, task.train, (self.config.seed, index))
        self.strategy.finish(index)
        optimiser.zero_grad(set_to_none=True)
        self._optimiser = None
        self.train_seconds = time.perf_counter() - start + sum(
            record.seconds for record in self.epochs if record.task_index == index)

    def _memory_of(self, task: TaskFeatures) -> tuple[str, str]:
        """What training a task keeps on the device, and what makes it less."""
        held = sum(features.nbytes for features in (task.train, task.validation)
                   if features is not None)
        return (f"training task {task.name!r} at batch_size {self.config.batch_size} with "
                f"{held / 1e6:,.1f} MB of features on device {self.device}",
                f"a smaller batch_size, {MORE_ROOM}")

    def _add_task(self, task: TaskFeatures) -> None:
        self.strategy.add_task(task.classes, task.refreshes)
        self.strategy.to(self.device)
        self.strategy.finish(len(self.finished))

    def _conclude(self, tasks: Sequence[TaskFeatures],
                  measured: dict[str, Tensor] | None = None) -> TaskRecord:
        """Measures the newly trained task and all earlier ones.

        Raises: DeviceMemoryError if the device's memory does not suffice.
        """
        with explained(f"measuring the tasks after {tasks[len(self.finished)].name!r} on device "
                       f"{self.device}", MORE_ROOM):
            return self._measured(tasks, measured)

    def _measured(self, tasks: Sequence[TaskFeatures],
                  measured: dict[str, Tensor] | None) -> TaskRecord:
        index, start = len(self.finished), time.perf_counter()
        self.strategy.conclude(index)
        row, measured_now = accuracy_row(
            self.strategy, [task.test for task in tasks[:index + 1]], self.finished, self._grounds,
            re_evaluate=self.re_evaluate)
        without_id = self._learn_inference(tasks, index, measured)
        self.finished.append(TaskRecord(tasks[index].name, index, row, self.train_seconds,
                                        time.perf_counter() - start, without_id,
                                        measured_now))
        return self.finished[-1]

    def measure_task(self, tasks: Sequence[TaskFeatures], index: int,
                     inference: Inference) -> dict[str, Tensor]:
        """The statistics of a trained task that `inference` takes."""
        task = tasks[index]
        assert task.train is not None, f"task {task.name} has no training features"
        self.strategy.eval()
        if isinstance(inference, Detector):
            inference.see(self.strategy)
        solved = any(record.solved for record in self.epochs if record.task_index == index)
        held_out_NK = unseen_logits(self.strategy, index, task, solved=solved)
        return measure(inference, LearnedTask(index, task.train, task.validation, task.classes,
                                              held_out_NK, self.config.seed, task.refreshes))

    def _learn_inference(self, tasks: Sequence[TaskFeatures], index: int,
                         measured: dict[str, Tensor] | None) -> dict[str, float] | None:
        """Adds a task's features to task inference; returns metrics from before and after that.

        None without task inference, and after most tasks of a long stream (`is_measured_after`).
        """
        if self.inference is None:
            return None
        if isinstance(self.inference, Detector):
            self.inference.see(self.strategy.eval())
        if measured is None:
            measured = self.measure_task(tasks, index, self.inference)
        if not is_measured_after(index, len(tasks)):
            add_measured(self.inference, measured, tasks[index].refreshes)
            return None
        tests = [task.test for task in tasks[:index + 1]]
        metrics, known, newest = {}, _newest(tasks[:index]), _newest(tasks[:index + 1])
        if 0 < len(known) < len(newest) and is_measured_after(index):  # a new task, not the first
            metrics["rejection_auroc"] = rejection_auroc(
                self.strategy, self.inference, tests[:-1], tests[-1], known)
        add_measured(self.inference, measured, tasks[index].refreshes)
        return metrics | without_task_id(self.strategy, self.inference, tests, newest,
                                         heads_alone=index + 1 == len(tasks),
                                         classes=class_names(tasks[:index + 1]))

    def _begin(self, index: int, classes: int, refreshes: int | None = None) -> None:
        if index == len(self.strategy.classes):
            self.strategy.add_task(classes, refreshes)
        self.strategy.to(self.device)
        self.strategy.begin(index)
        self._optimiser = make_optimiser(self.strategy, self.config)
        self._best = BestState()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that `restore` needs: tensors by name, and a dict of plain values."""
        tensors = {f"strategy.{key}": value for key, value in self.strategy.state_dict().items()}
        if self._optimiser is not None:
            tensors |= {f"experience.{key}": value
                        for key, value in self.strategy.experience_state().items()}
            tensors |= optimiser_tensors(self._optimiser, self._trainable())
            tensors |= {f"best.{key}": value for key, value in self._best.tensors.items()}
        if self.inference is not None:
            tensors |= {f"inference.{key}": value
                        for key, value in self.inference.tensors().items()}
        return tensors, {"classes": list(self.strategy.classes),
                         "epochs": list(map(fields_of, self.epochs)),
                         "finished": list(map(fields_of, self.finished))}

    def restore(self, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        """Restores the result of `state` in a new learner of the same configuration."""
        self.strategy.load_tasks(fields["classes"], tensors_below(tensors, "strategy."),
                                 len(fields["finished"]))
        self.strategy.to(self.device)
        self.epochs = [EpochRecord(**record) for record in fields["epochs"]]
        self.finished = [TaskRecord.from_fields(record) for record in fields["finished"]]
        if self.inference is not None:
            assert isinstance(self.inference, Detector), "a learner is restored once"
            self.inference = stored_inference(tensors_below(tensors, "inference."),
                                              len(self.finished), self.inference)
        if len(self.finished) == len(self.strategy.classes):
            return
        self._begin(len(self.finished), self.strategy.classes[-1])
        self.strategy.restore_experience(
            {key: value.to(self.device)
             for key, value in tensors_below(tensors, "experience.").items()})
        losses = [record.held_out_loss for record in self.epochs
                  if record.task_index == len(self.finished)]
        self._best = BestState([loss for loss in losses if loss is not None],
                               {key: value.to(self.device) for key, value
                                in tensors_below(tensors, "best.").items()})
        if self.epochs_done:
            load_optimiser(cast(torch.optim.Optimizer, self._optimiser), self._trainable(),
                           tensors)

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, value) for name, value in self.strategy.named_parameters()
                if value.requires_grad]


def class_names(tasks: Sequence[TaskFeatures]) -> list[tuple[str, ...]] | None:
    """Names of the classes of each task; None where those of one are not known."""
    names = [task.names for task in tasks]
    return names if all(names) else None


def _newest(tasks: Sequence[TaskFeatures]) -> list[int]:
    """Indices of the newest slot of every task."""
    return sorted(newest_slots([task.name for task in tasks]).values())
