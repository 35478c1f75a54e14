"""Takes a task out of a learned model, and out of the records of how it was learned.

The task's own parameters go, and so does all that the detector knows of it. What other tasks share
with it stays, and `stays` names it: a trunk that was trained on the first task, the weights to
which the other tasks add, or parameters that all tasks share.
"""

import dataclasses
from collections.abc import Sequence

from partialhn.checkpoints.model import Model, empty_parts
from partialhn.data.experience import newest_slots, task_of
from partialhn.detector.detector import Detector
from partialhn.errors import InputError
from partialhn.features.feature_set import FeatureSet
from partialhn.naming import digest
from partialhn.task_inference import Inference
from partialhn.training.lineage import Learned


def slots_of_task(names: Sequence[str], task: str) -> list[int]:
    """Indices of the slots of a task. Raises: InputError for an unknown task, or the only one."""
    tasks = list(newest_slots(names))
    if task not in tasks:
        raise InputError(f"task is {task!r}; allowed: {', '.join(tasks)}")
    if len(tasks) == 1:
        raise InputError(f"task {task!r} is the only one of the stream; allowed: a stream with at "
                         "least one other task, or to delete the registered model in MLflow")
    return [slot for slot, name in enumerate(names) if task_of(name) == task]


def id_without(lineage_id: str, task: str) -> str:
    """Lineage id of the model with this id after it has forgotten a task."""
    return digest(["forget", lineage_id, task], 32)


def stays(model: Model, slots: Sequence[int]) -> tuple[str, ...]:
    """The parts, in words, that learned from these slots and stay when they are forgotten."""
    trunk = ["the trunk, which was trained on it"] * (
        0 in slots and model.config.backbone.trains_trunk)
    return (*trunk, *model.strategy.shared_with(slots))


def without_slots(model: Model, slots: Sequence[int], train: FeatureSet | None) -> Model:
    """The model without the slots of a task.

    train: training features of the task's newest slot, to take them off the detector's sums.
    Raises: InputError where the strategy cannot do without them, where the features are needed and
    are None, or for task inference of version 0.1.0, whose sums are not exact.
    """
    trunk, strategy = empty_parts(model.config)
    trunk.load_state_dict(model.trunk.state_dict())
    trunk.pixels = model.trunk.pixels
    tasks = tuple(task for slot, task in enumerate(model.tasks) if slot not in slots)
    strategy.load_tasks([len(task.classes) for task in tasks], model.strategy.state_without(slots))
    strategy.requires_grad_(False).eval()
    task = task_of(model.tasks[slots[0]].name)
    inference = _copy_of(model.inference, task)
    if inference is not None:
        if train is None:
            raise InputError(f"task {task!r} cannot be forgotten: its stored training features are "
                             "missing, which have to be taken off the detector's sums; allowed: to "
                             "restore them, or a new stream without it")
        inference.see(strategy)
        inference.forget(slots, train)
    return Model(model.config, trunk, strategy, tasks, inference=inference)


def _copy_of(inference: Inference | None, task: str) -> Detector | None:
    """A copy of a model's detector, to take the task out of it."""
    if inference is None:
        return None
    if not isinstance(inference, Detector):
        raise InputError(f"task {task!r} cannot be forgotten: the model has the task inference of "
                         "version 0.1.0, whose sums are rounded; allowed: a new stream without it")
    found = Detector.from_tensors(inference.tensors(), len(inference))
    found.false_alarms = inference.false_alarms
    return found


def records_without(learned: Learned, slots: Sequence[int], lineage_id: str,
                    parent: str) -> Learned:
    """The records of a task that stays, under the lineage id of the model without the slots.

    Accuracies without a task were measured among the forgotten classes, so they are left out.
    """
    index = learned.record.task_index - sum(slot < learned.record.task_index for slot in slots)
    row = tuple(accuracy for slot, accuracy in enumerate(learned.record.accuracy_row)
                if slot not in slots)
    return Learned(
        lineage_id, parent,
        dataclasses.replace(learned.record, task_index=index, accuracy_row=row, without_id=None,
                            measured=None),
        tuple(dataclasses.replace(epoch, task_index=index) for epoch in learned.epochs),
        learned.task_bytes)
