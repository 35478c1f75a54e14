"""What a result says: the numbers a report needs, checked once, and the verdict in plain words.

`result.json` holds many optional parts (no bounds run, nothing registered, one task only);
`Facts` is where "missing" is decided, so that the drawing code need not ask.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from partialhn import metrics
from partialhn.errors import InputError

FORGETTING_LIMIT = 0.01
GAP_LIMIT = 0.02
LABELS = {
    "partial_hn": "Partial hypernetwork",
    "separate_heads": "Separate head per task",
    "naive": "Naive fine-tuning",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """One column of the comparison: ours or a bound. None is "not measured"."""

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
    bounds: Mapping[str, Method]
    details: tuple[Mapping[str, Any], ...]
    """What is known of each task: classes, train_images, test_images, bad_images, transform."""
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
        separate = self.bounds.get("separate_heads")
        if separate is None or separate.acc is None:
            return None
        return separate.acc - self.metrics.accuracy

    @property
    def task_seconds(self) -> float | None:
        """Mean seconds a task took, all of its stages together."""
        rows = dig(self.result, "seconds", "per_task") or []
        if not rows:
            return None
        return sum(row.get(key) or 0 for row in rows
                   for key in ("train", "evaluate", "register")) / len(rows)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`status` is good, fair or bad; `cautions` are what a careful reader must know."""

    status: str
    headline: str
    paragraph: str
    cautions: tuple[str, ...]


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
    ours = Method(LABELS.get(strategy, strategy), summary.accuracy, summary.learning_accuracy,
                  summary.forgetting, summary.backward_transfer, result.get("bytes_per_task"),
                  dig(result, "seconds", "stages", "train"))
    bounds = {key: _bound(key, values) for key, values in (result.get("bounds") or {}).items()
              if values}
    return Facts(name=str(result.get("name") or "unnamed stream"),
                 tasks=tuple(str(task.get("name") or i) for i, task in enumerate(details)),
                 accuracy_TT=table_TT, metrics=summary, ours=ours, bounds=bounds,
                 details=tuple(details), result=result)


def _bound(key: str, values: Mapping[str, Any]) -> Method:
    return Method(LABELS.get(key, key), values.get("acc"), values.get("learning_accuracy"),
                  values.get("forgetting"), values.get("bwt"), values.get("bytes_per_task"),
                  values.get("seconds"))


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


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
    return f"{number} point" if number == "1.0" else f"{number} points"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(n_bytes: float | None) -> str:
    if n_bytes is None:
        return "–"
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    power = next((p for p in (1, 2, 3) if n_bytes < 999.5 * 1000 ** p), 4)
    value, unit = n_bytes / 1000 ** power, ("kB", "MB", "GB", "TB")[power - 1]
    return f"{value:.1f} {unit}" if value < 99.5 else f"{value:.0f} {unit}"


def mask_password(text: str) -> str:
    """Hides the password of a URI such as postgresql://user:password@host/database."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:***@", text)


def verdict(facts: Facts) -> Verdict:
    """The plain-language verdict, computed from the numbers alone and honest when they are bad."""
    forgets = facts.metrics.forgetting > FORGETTING_LIMIT + 1e-9
    behind = facts.gap is not None and facts.gap > GAP_LIMIT + 1e-9
    chance = facts.chance
    useless = chance is not None and facts.metrics.accuracy < chance + 0.1 * (1 - chance)
    count = _tasks(len(facts.tasks))
    if useless:
        status, headline = "bad", "It did not learn: hardly better than guessing."
    elif forgets and behind:
        status, headline = "bad", "It forgets, and it learns less than separate heads do."
    elif forgets:
        status, headline = "bad", f"It learned {count}, but forgets the earlier ones."
    elif behind:
        status = "fair"
        headline = "It keeps what it learned, but learns less than separate heads do."
    elif len(facts.tasks) == 1:
        status, headline = "good", "It learned its first task; nothing could be forgotten yet."
    else:
        status, headline = "good", f"It learned {count} and still knows them all."
    sentences = [_learned(facts), _kept(facts, forgets), _against_bounds(facts, behind),
                 _cost(facts)]
    return Verdict(status, headline, " ".join(s for s in sentences if s), _cautions(facts))


def _tasks(n: int) -> str:
    return "1 task" if n == 1 else f"{n} tasks"


def _learned(facts: Facts) -> str:
    classes = sum(len(task.get("classes") or ()) for task in facts.details)
    what = _tasks(len(facts.tasks)) + (" one after another" if len(facts.tasks) > 1 else "")
    what += f" ({classes} classes in all)" if classes else ""
    again = " without going back to the images of earlier ones" if len(facts.tasks) > 1 else ""
    guess = f"; guessing would get {percent(facts.chance)}" if facts.chance is not None else ""
    return (f"The model was taught {what}{again}. Told which task an image belongs to, it now "
            f"names the right class for {percent(facts.metrics.accuracy)} of test images{guess}.")


def _kept(facts: Facts, forgets: bool) -> str:
    if len(facts.tasks) == 1:
        return ""
    drops = facts.metrics.forgetting_per_task
    worst = int(np.argmax(drops))
    if max(drops) < 5e-4:
        return "Earlier tasks still work: none of them lost accuracy while later ones were learned."
    most = (f"most of all “{facts.tasks[worst]}”, from "
            f"{percent(facts.accuracy_TT[-1, worst] + drops[worst])} at its best to "
            f"{percent(facts.accuracy_TT[-1, worst])}")
    lost = f"earlier tasks lost {in_points(facts.metrics.forgetting)} on average since their best"
    if forgets:
        return (f"It forgets: {lost}, {most}. This is more than the 1 point that counts as "
                "acceptable here, so do not rely on the earlier tasks without checking them.")
    return f"Earlier tasks still work: {lost}, {most}."


def _against_bounds(facts: Facts, behind: bool) -> str:
    sentences = []
    gap, naive = facts.gap, facts.bounds.get("naive")
    if gap is not None:
        reach = ("A separate head for every task, which cannot forget, reaches "
                 f"{percent(facts.metrics.accuracy + gap)}")
        if behind:
            sentences.append(f"{reach}: {in_points(gap)} better, more than the 2 points that "
                             "count as acceptable here. Where accuracy matters more than size, "
                             "separate heads are the better choice for this stream.")
        elif gap >= 5e-4:
            sentences.append(f"{reach}, {in_points(gap)} better.")
        elif gap > -5e-4:
            sentences.append(f"{reach}, no better.")
        else:
            sentences.append(f"{reach}, {in_points(-gap)} less.")
    if naive is not None and naive.acc is not None:
        worth = facts.metrics.accuracy - naive.acc
        ends = f"Simply training on (naive fine-tuning) ends at {percent(naive.acc)}"
        sentences.append(f"{ends}: protecting the earlier tasks is worth {in_points(worth)}."
                         if worth >= 5e-4 else
                         f"{ends}: on this stream the protection gained nothing.")
    if not sentences:
        return ("Nothing else was trained beside it, so this report cannot say how much accuracy "
                "sharing one model costs.")
    return " ".join(sentences)


def _cost(facts: Facts) -> str:
    ours, separate = facts.ours.bytes_per_task, facts.bounds.get("separate_heads")
    parts = []
    if facts.task_seconds is not None:
        parts.append(f"took {duration(facts.task_seconds)}")
    if ours is not None:
        adds = f"adds {size(ours)} to the model"
        if separate is not None and separate.bytes_per_task:
            adds += f", against {size(separate.bytes_per_task)} for a separate head"
        parts.append(adds)
    if not parts:
        return ""
    cost = f"A new task {' and '.join(parts)}."
    pays = break_even(facts)
    if pays is not None:
        cost += (f" Counting the part that all tasks share, the whole is smaller than separate "
                 f"heads from {_tasks(pays)} on.")
    return cost


def break_even(facts: Facts) -> int | None:
    """Tasks from which the shared part pays: shared + n * ours < n * separate.

    None where that is unknown, or where it never pays.
    """
    separate, ours = facts.bounds.get("separate_heads"), facts.ours.bytes_per_task
    shared = facts.result.get("shared_bytes")
    if separate is None or separate.bytes_per_task is None or ours is None or shared is None:
        return None
    if separate.bytes_per_task <= ours:
        return None
    return math.floor(shared / (separate.bytes_per_task - ours)) + 1


def _cautions(facts: Facts) -> tuple[str, ...]:
    found = []
    bad = sum(task.get("bad_images") or 0 for task in facts.details)
    if bad:
        found.append(f"{bad} unreadable {'image was' if bad == 1 else 'images were'} left out.")
    tested = [task.get("test_images") or 0 for task in facts.details]
    if all(tested) and min(tested) < 500:
        found.append(f"The smallest test set has {min(tested)} images, so one image is "
                     f"{in_points(1 / min(tested))} there; read small differences with care.")
    if facts.result.get("seed") is not None:
        found.append(f"One run with one seed ({facts.result['seed']}); another seed would give "
                     "slightly different numbers.")
    return tuple(found)
