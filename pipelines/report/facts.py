"""The numbers of a result that a report needs, checked once.

Many parts of `result.json` are optional (no baselines run, nothing registered, one task only).
`Facts` decides what counts as missing, so that the drawing code need not ask.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from partialhn.errors import InputError
from partialhn.evaluation import metrics
from partialhn.evaluation.certainty import Estimate, difference
from partialhn.evaluation.doubts import doubts
from partialhn.strategies.table import label_of
from partialhn.training.records import Forgotten

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
    """A result with every field present; a field is None only where its type says so."""

    name: str
    tasks: tuple[str, ...]
    accuracy_TT: npt.NDArray[np.float64]
    metrics: metrics.StreamMetrics
    ours: Method
    baselines: Mapping[str, Method]
    details: tuple[Mapping[str, Any], ...]
    """For each task: classes, train_images, test_images, bad_images, transform, as far as known."""
    result: Mapping[str, Any]

    @property
    def chance(self) -> float | None:
        """Mean accuracy of guessing, None where the classes are unknown."""
        counts = [len(task.get("classes") or ()) for task in self.details]
        return float(np.mean([1 / n for n in counts])) if all(counts) else None

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
                               losses.get(index, ()), rate)
            found += [(name, text) for text in sentences]
        return found

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
    summary = metrics.summarise(table_TT)
    strategy = str(result.get("strategy") or "partial_hn")
    ours = Method(label_of(strategy), summary.accuracy, summary.learning_accuracy,
                  summary.forgetting, summary.backward_transfer, result.get("bytes_per_task"),
                  _train_seconds(result))
    baselines = {key: _baseline(key, values) for key, values in (result.get("bounds") or {}).items()
              if values}
    return Facts(name=str(result.get("name") or "unnamed stream"),
                 tasks=tuple(str(task.get("name") or i) for i, task in enumerate(details)),
                 accuracy_TT=table_TT, metrics=summary, ours=ours, baselines=baselines,
                 details=tuple(details), result=result)


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
