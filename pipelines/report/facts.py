"""The numbers of a result that a report needs, checked once.

Many parts of `result.json` are optional (no baselines run, nothing registered, one task only).
`Facts` decides what counts as missing, so that the drawing code need not ask.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from partialhn.data.experience import newest_slots, slots_behind, task_of
from partialhn.errors import InputError
from partialhn.evaluation import metrics
from partialhn.evaluation.certainty import Estimate, difference
from partialhn.evaluation.doubts import doubts
from partialhn.numbers import size
from partialhn.strategies.table import label_of
from partialhn.training.records import Forgotten
from pipelines.report.charts import row_label

FORGETTING_LIMIT = 0.01
"""Mean forgetting that the verdict accepts: 1 point."""
GAP_LIMIT = 0.02
"""Accuracy behind separate heads that the verdict accepts: 2 points."""


@dataclasses.dataclass(frozen=True)
class Method:
    """One column of the comparison: ours or a baseline. None is "not measured"."""

    label: str
    acc: float | None
    learning_accuracy: float | None
    forgetting: float | None
    bwt: float | None
    bytes_per_task: float | None
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Facts:
    """A result with every field present; a field is None only where its type says so.

    A task that was learned again is here once, by its newest slot, and the fields of `result` that
    name tasks by their index do so in this order.
    """

    name: str
    tasks: tuple[str, ...]
    """In the order in which their newest slots were learned."""
    numbers: tuple[int, ...]
    """The number of each task, which `--task` takes."""
    accuracy_TT: npt.NDArray[np.float64]
    metrics: metrics.StreamMetrics
    ours: Method
    """Its bytes are without those of the detector, which no baseline has."""
    detector_bytes: float
    """Bytes that a task adds to what finds the task of an image where nobody says it; 0 where that
    was not learned, and in results of releases that do not tell these bytes apart."""
    baselines: Mapping[str, Method]
    details: tuple[Mapping[str, Any], ...]
    """For each task: classes, train_images, test_images, bad_images, transform, as far as known;
    the images are those of all slots whose images the newest one is learned and tested on."""
    result: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """The tasks by number and name."""
        return tuple(map(row_label, self.numbers, self.tasks))

    @property
    def chance(self) -> float | None:
        """Mean accuracy of guessing, None where the classes are unknown."""
        counts = [len(task.get("classes") or ()) for task in self.details]
        return float(np.mean([1 / n for n in counts])) if all(counts) else None

    @property
    def classes(self) -> set[str]:
        """Names of all classes; several tasks may have the same ones."""
        return {str(name) for task in self.details for name in task.get("classes") or ()}

    @property
    def guessing(self) -> tuple[float, ...]:
        """Accuracy of guessing on every task; empty where the classes of one are unknown."""
        counts = [len(task.get("classes") or ()) for task in self.details]
        return tuple(1 / n for n in counts) if all(counts) else ()

    @property
    def behind_heads(self) -> Estimate | None:
        """`gap` with its interval; None where the test images or the heads' tasks are unknown."""
        rows = dig(self.result, "bounds", "separate_heads", "accuracy_matrix")
        counts = [task.get("test_images") or 0 for task in self.details]
        if self.gap is None or not rows or not all(counts) or len(rows[-1]) != len(counts):
            return None
        return difference([rows[-1]], [self.accuracy_TT[-1].tolist()], counts)

    @property
    def gap(self) -> float | None:
        """Separate heads' ACC minus ours, None when they were not trained."""
        separate = self.baselines.get("separate_heads")
        if separate is None or separate.acc is None:
            return None
        return separate.acc - self.metrics.accuracy

    @property
    def bad_images(self) -> list[tuple[str, str, str]]:
        """(task, image, reason) of every image that was left out."""
        return [(name, str(image.get("id")), str(image.get("reason")))
                for name, task in zip(self.tasks, self.details, strict=True)
                for image in task.get("bad_images") or ()]

    @property
    def doubts(self) -> list[tuple[str, str]]:
        """(task, sentence) of every task whose loss rose, or that is close to guessing or below
        ridge regression.
        """
        last: dict[Any, Mapping[str, Any]] = {}
        losses: dict[Any, list[float]] = {}
        for epoch in self.result.get("epochs") or []:
            last[epoch.get("task_index")] = epoch
            if epoch.get("passes", 1) and epoch.get("cross_entropy") is not None:
                losses.setdefault(epoch.get("task_index"), []).append(epoch["cross_entropy"])
        rate, found = dig(self.result, "config", "train", "learning_rate"), []
        for index, (name, task) in enumerate(zip(self.tasks, self.details, strict=True)):
            if not task.get("classes"):
                continue
            epoch = last.get(index, {})
            sentences = doubts(float(self.accuracy_TT[index, index]), task.get("test_images"),
                               len(task["classes"]), epoch.get("validation_accuracy"),
                               epoch.get("ridge_accuracy"), task.get("validation_images"),
                               losses.get(index, ()), rate, float(self.accuracy_TT[-1, index]))
            found += [(name, text) for text in sentences]
        return found

    @property
    def detector_adds(self) -> str:
        """What a task adds to the detector, in a sentence; empty where that is nothing."""
        return ("The detector, which finds the task where nobody says it, adds "
                f"{size(self.detector_bytes)} more for each task." if self.detector_bytes else "")

    @property
    def notes(self) -> list[str]:
        """What the user should know of the run and the model."""
        return [str(note) for note in self.result.get("notes") or ()]

    @property
    def forgotten(self) -> list[str]:
        """The tasks that the model has forgotten, in words."""
        return [f"T{str(Forgotten.from_fields(fields))[1:]}"
                for fields in self.result.get("forgotten") or ()]

    @property
    def task_seconds(self) -> float | None:
        """Mean seconds of a task: training, evaluation and registration together."""
        rows = dig(self.result, "seconds", "per_task") or []
        if not rows:
            return None
        return sum(row.get(key) or 0 for row in rows
                   for key in ("train", "evaluate", "register")) / len(rows)


def dig(values: Any, *keys: str) -> Any:
    """The value under nested keys, None when any of them is missing or null."""
    for key in keys:
        if not isinstance(values, Mapping):
            return None
        values = values.get(key)
    return values


def read_facts(result: Mapping[str, Any]) -> Facts:
    """Checks a result and fills in what is missing.

    The metrics are computed from the accuracy matrix, never copied from the result's summary.
    Raises: InputError without a usable `accuracy_matrix`.
    """
    if result.get("accuracy_matrix") is None:
        raise InputError("the result has no accuracy_matrix; give the result.json of a training "
                         "run that finished at least one task")
    table_TT = metrics.as_accuracy_table(result["accuracy_matrix"])
    given = list(result.get("tasks") or [])[:len(table_TT)]
    details = given + [{}] * (len(table_TT) - len(given))
    names = [str(task.get("name") or i) for i, task in enumerate(details)]
    newest = newest_slots(names)
    places = sorted(newest.values())
    tasks, behind = [task_of(names[place]) for place in places], slots_behind(names)
    summary = metrics.summarise(table_TT, places)
    strategy = str(result.get("strategy") or "partial_hn")
    adds, detector_bytes = result.get("bytes_per_task"), result.get("detector_bytes_per_task") or 0
    ours = Method(label_of(strategy), summary.accuracy, summary.learning_accuracy,
                  summary.forgetting, summary.backward_transfer,
                  None if adds is None else adds - detector_bytes, _train_seconds(result))
    baselines = {key: _baseline(key, values) for key, values in (result.get("bounds") or {}).items()
              if values}
    return Facts(name=str(result.get("name") or "unnamed stream"), tasks=tuple(tasks),
                 numbers=tuple(map(list(newest).index, tasks)),
                 accuracy_TT=table_TT[np.ix_(places, places)], metrics=summary, ours=ours,
                 detector_bytes=detector_bytes, baselines=baselines,
                 details=tuple(_together([details[slot] for slot in behind[place]])
                               for place in places),
                 result=_of_slots(result, places))


def _together(slots: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The last of some slots of a task, with the images of all of them."""
    counts = {key: sum(slot[key] for slot in slots)
              for key in ("train_images", "validation_images", "test_images")
              if all(slot.get(key) is not None for slot in slots)}
    return {**slots[-1], **counts,
            "bad_images": [image for slot in slots for image in slot.get("bad_images") or ()]}


def _of_slots(result: Mapping[str, Any], places: Sequence[int]) -> Mapping[str, Any]:
    """The result with the epochs and reviews of some slots only, counted as these are."""
    number = {place: number for number, place in enumerate(places)}

    def kept(field: str, index: str) -> list[dict[str, Any]]:
        return [{**each, index: number[each.get(index) or 0]} for each in result.get(field) or []
                if (each.get(index) or 0) in number]

    return {**result, "epochs": kept("epochs", "task_index"), "review": kept("review", "index")}


def _train_seconds(result: Mapping[str, Any]) -> float | None:
    """Seconds of training our own tasks; the stage's total may include the baselines."""
    rows = [row.get("train") for row in dig(result, "seconds", "per_task") or []]
    if rows and None not in rows:
        return float(sum(rows))
    stage: float | None = dig(result, "seconds", "stages", "train")
    return stage


def _baseline(key: str, values: Mapping[str, Any]) -> Method:
    return Method(label_of(key), values.get("acc"), values.get("learning_accuracy"),
                  values.get("forgetting"), values.get("bwt"), values.get("bytes_per_task"),
                  values.get("seconds"))


def break_even(facts: Facts) -> int | None:
    """The smallest number of tasks n for which the model with its shared part is smaller than
    separate heads: shared + n * ours < n * separate.

    None where that is unknown, or where the model never becomes smaller.
    """
    separate, ours = facts.baselines.get("separate_heads"), facts.ours.bytes_per_task
    shared = facts.result.get("shared_bytes")
    if separate is None or separate.bytes_per_task is None or ours is None or shared is None:
        return None
    if separate.bytes_per_task <= ours:
        return None
    return int(shared / (separate.bytes_per_task - ours)) + 1
