"""The records that a training loop yields: one for each epoch, one for each finished task."""

import dataclasses
from collections.abc import Mapping
from typing import Any


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
    """Passes over the images in this epoch."""


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
    """Metrics of task inference, if it is learned: rejection_auroc (how well this task's images
    were distinguished from those of earlier tasks before it was learned) and, after the last task,
    the result of `partialhn.evaluation.task_inference_metrics.without_task_id`."""

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "TaskRecord":
        """Rebuilds a record from the fields that `dataclasses.asdict` and JSON gave."""
        return TaskRecord(**{**fields, "accuracy_row": tuple(fields["accuracy_row"])})
