"""The records that a training loop yields."""

import dataclasses
from collections.abc import Mapping
from typing import Any


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
    `partialhn.evaluation.task_inference_metrics.without_task_id` says."""

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "TaskRecord":
        """The record that `dataclasses.asdict` and JSON made these fields of."""
        return TaskRecord(**{**fields, "accuracy_row": tuple(fields["accuracy_row"])})
