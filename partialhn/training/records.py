"""The records of a stream: one for each epoch, each finished task and each forgotten task."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

ALWAYS, AMONG = 64, 16
"""Task inference is measured after each of so many first tasks, and then after one of `AMONG`: the
cost of a run would otherwise grow with the square of its tasks."""


@dataclasses.dataclass(frozen=True)
class EpochRecord:
    """The result of one pass over a task's training images."""

    task: str
    task_index: int
    epoch: int
    """Number of the epoch, from 1 to `epochs`."""
    epochs: int
    loss: float
    cross_entropy: float
    regulariser: float
    """The strategy's own term in the loss."""
    accuracy: float
    """Share of training images classified correctly during the epoch, 0 to 1."""
    validation_accuracy: float | None
    seconds: float
    held_out_loss: float | None = None
    """`partialhn.training.budget.held_out_loss`, where training stops by it."""
    passes: int = 1
    """Passes over the images in this epoch; 0 where no step was taken."""
    ridge_accuracy: float | None = None
    """Held-out accuracy of ridge regression, in the last record of a task. Where the choice was
    made (`partialhn.training.choice`), `validation_accuracy` is that of what was chosen."""
    solved: bool = False
    """Whether the task ends as ridge regression."""


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """The result of one finished experience."""

    task: str
    task_index: int
    accuracy_row: tuple[float, ...]
    """R[i, 0..i]: accuracy on the test images of every task so far."""
    train_seconds: float
    evaluate_seconds: float
    without_id: dict[str, float] | None = None
    """Metrics of task inference, if it is learned: the result of
    `partialhn.evaluation.task_inference_metrics.without_task_id` on the tasks so far, and
    rejection_auroc (how well this task's images were distinguished from those of earlier tasks
    before it was learned). None after most tasks of a long stream (`is_measured_after`); version
    0.1.0 measured the former after the last task only."""
    measured: dict[str, str] | None = None
    """Grounds (`partialhn.training.measured`) of the accuracies that were measured for this record,
    by the index of the task; the others were carried over. None in records of version 0.1.0."""

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "TaskRecord":
        """Rebuilds a record from the fields that `dataclasses.asdict` and JSON gave."""
        return TaskRecord(**{**fields, "accuracy_row": tuple(fields["accuracy_row"])})


@dataclasses.dataclass(frozen=True)
class Forgotten:
    """A task that a model has forgotten."""

    task: str
    classes: tuple[str, ...]
    why: str
    who: str
    """The person, as user@host."""
    time: str
    """UTC, ISO 8601."""
    stays: tuple[str, ...] = ()
    """The parts, in words, that learned from the task and stay in the model."""

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "Forgotten":
        """Rebuilds the object from the fields that `dataclasses.asdict` and JSON gave."""
        return Forgotten(**{**fields, "classes": tuple(fields["classes"]),
                            "stays": tuple(fields["stays"])})

    def __str__(self) -> str:
        return (f"task {self.task!r} was forgotten on {self.time[:10]} by {self.who}"
                + (f" ({self.why})" if self.why else ""))


def fields_of(record: EpochRecord | TaskRecord) -> dict[str, Any]:
    """The fields of a record, as they are stored. `dataclasses.asdict` would copy every number of
    the accuracy rows, of which there are as many as tasks.
    """
    return dict(vars(record))


def is_measured_after(task: int, tasks: int | None = None) -> bool:
    """Whether task inference is measured after a task, by its index.

    tasks: number of tasks of the run; it is measured after the last one, too, but for
    rejection_auroc, which takes a fit of its own and is averaged over tasks.
    """
    return task < ALWAYS or (task + 1) % AMONG == 0 or task + 1 == tasks


def class_incremental(finished: Sequence[TaskRecord]) -> dict[str, float]:
    """Accuracy where nobody says the task, over the classes of all tasks so far.

    Keys: last (after the last task) and, where it was measured after every task but those that
    `is_measured_after` leaves out, average_incremental (the mean over the measured ones). Empty if
    the last task did not measure it.
    """
    after = {place: record.without_id["acc"] for place, record in enumerate(finished)
             if record.without_id and "acc" in record.without_id}
    last = len(finished) - 1
    if last not in after:
        return {}
    if any(is_measured_after(place, len(finished)) and place not in after
           for place in range(len(finished))):
        return {"last": after[last]}
    return {"last": after[last], "average_incremental": sum(after.values()) / len(after)}
