"""What a result says: the numbers a report needs, checked once, and how they are written.

`result.json` holds many optional parts (no baselines run, nothing registered, one task only);
`Facts` is where "missing" is decided, so that the drawing code need not ask.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from partialhn.errors import InputError
from partialhn.evaluation import metrics
from partialhn.strategies.table import label_of

FORGETTING_LIMIT = 0.01
GAP_LIMIT = 0.02
NBSP = "\u00a0"


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
    """A result with its holes filled: every field is there, None only where said."""

    name: str
    tasks: tuple[str, ...]
    accuracy_TT: npt.NDArray[np.float64]
    metrics: metrics.StreamMetrics
    ours: Method
    baselines: Mapping[str, Method]
    details: tuple[Mapping[str, Any], ...]
    """Facts about each task: classes, train_images, test_images, bad_images, transform."""
    result: Mapping[str, Any]

    @property
    def chance(self) -> float | None:
        """Mean accuracy of guessing, None where the classes are unknown."""
        counts = [len(task.get("classes") or ()) for task in self.details]
        return float(np.mean([1 / n for n in counts])) if all(counts) else None

    @property
    def standard_error(self) -> float | None:
        """Binomial standard error of ACC from the finite test sets, None where unknown."""
        counts = [task.get("test_images") or 0 for task in self.details]
        if not all(counts):
            return None
        last_T = self.accuracy_TT[-1]
        return float(np.sqrt((last_T * (1 - last_T) / counts).sum()) / len(counts))

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
    def task_seconds(self) -> float | None:
        """Mean seconds a task took, all of its stages together."""
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
    """Checks a result and fills its holes.

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
    """Seconds that training our own tasks took: the stage may hold the baselines as well."""
    rows = [row.get("train") for row in dig(result, "seconds", "per_task") or []]
    if rows and None not in rows:
        return float(sum(rows))
    stage: float | None = dig(result, "seconds", "stages", "train")
    return stage


def _baseline(key: str, values: Mapping[str, Any]) -> Method:
    return Method(label_of(key), values.get("acc"), values.get("learning_accuracy"),
                  values.get("forgetting"), values.get("bwt"), values.get("bytes_per_task"),
                  values.get("seconds"))


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.{digits}f}{NBSP}%"


def points(share: float | None, signed: bool = False) -> str:
    """A difference of two accuracies in percentage points, with a real minus sign."""
    if share is None:
        return "–"
    number = f"{100 * share:+.1f}" if signed else f"{100 * share:.1f}"
    if float(number) == 0:
        number = "0.0"
    return number.replace("-", "−")


def in_points(share: float) -> str:
    number = points(share)
    return f"{number}{NBSP}point" if number == "1.0" else f"{number}{NBSP}points"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f}{NBSP}s"
    if seconds < 119.5:
        return f"{seconds:.0f}{NBSP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60}{NBSP}min"


def size(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "–"
    if n_bytes < 1000:
        return f"{n_bytes:.0f}{NBSP}B"
    power = next((p for p in (1, 2, 3) if n_bytes < 999.5 * 1000 ** p), 4)
    value, unit = n_bytes / 1000 ** power, ("kB", "MB", "GB", "TB")[power - 1]
    return f"{value:.1f}{NBSP}{unit}" if value < 99.5 else f"{value:.0f}{NBSP}{unit}"


def break_even(facts: Facts) -> int | None:
    """Tasks from which the shared part pays: shared + n * ours < n * separate.

    None where that is unknown, or where it never pays.
    """
    separate, ours = facts.baselines.get("separate_heads"), facts.ours.bytes_per_task
    shared = facts.result.get("shared_bytes")
    if separate is None or separate.bytes_per_task is None or ours is None or shared is None:
        return None
    if separate.bytes_per_task <= ours:
        return None
    return int(shared / (separate.bytes_per_task - ours)) + 1
