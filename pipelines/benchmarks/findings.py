"""The findings of a benchmark in sentences: how deep the trunk can be frozen and why, the effect of
corrupted images, and where another strategy is the better choice.

Everything is computed from the measured cells and the rows that summarise them.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from partialhn.benchmarks.comparison import Row
from partialhn.evaluation.intervals import CONFIDENCE, Interval, paired
from partialhn.numbers import in_points, margin, percent, percent_with_margin, points

OURS = "partial_hn"
ENOUGH_TASKS = 4
"""With fewer later tasks a rank correlation says nothing."""


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """One task: how it differs from the first, and the accuracy that freezing deeper costs it."""

    name: str
    transform: str
    shift: float
    """`partialhn.evaluation.forecast.task_shift` in the features of the deepest depth, 0 to 1."""
    accuracy: tuple[float, ...]
    """Accuracy of the hypernetwork right after the task, by depth, the shallowest first; mean over
    seeds."""

    @property
    def lost(self) -> float:
        """Accuracy that the deepest depth loses against the shallowest."""
        return self.accuracy[0] - self.accuracy[-1]


def depths_of(cells: Sequence[Mapping[str, Any]]) -> list[int]:
    """Depths at which the hypernetwork was learned."""
    return sorted({cell["depth"] for cell in cells if cell["strategy"] == OURS})


def task_rows(cells: Sequence[Mapping[str, Any]]) -> list[TaskRow]:
    """A row for each task; the trunk was trained on the first."""
    depths = depths_of(cells)
    ours = [cell for cell in cells if cell["strategy"] == OURS]
    deepest = next(cell for cell in ours if cell["depth"] == depths[-1])
    learned = [[np.mean([cell["accuracy_matrix"][task][task] for cell in ours
                         if cell["depth"] == depth]) for depth in depths]
               for task in range(len(deepest["tasks"]))]
    return [TaskRow(task["name"], task["transform"], shift, tuple(map(float, accuracy)))
            for task, shift, accuracy in zip(deepest["tasks"], deepest["task_shift"], learned,
                                             strict=True)]


def how_deep(cells: Sequence[Mapping[str, Any]], unit: str) -> str:
    """The accuracy that freezing deeper costs the hypernetwork. unit: stage or block."""
    depths, by_depth = depths_of(cells), {}
    for depth in depths:
        by_depth[depth] = {cell["seed"]: cell["acc"] for cell in cells
                           if cell["strategy"] == OURS and cell["depth"] == depth}
    best = max(depths, key=lambda depth: Interval.of(list(by_depth[depth].values())).mean)
    top = Interval.of(list(by_depth[best].values()))
    sentences = [f"The hypernetwork is most accurate with {frozen(best, unit)}: "
            f"{percent_with_margin(top.mean, top.low)}."]
    for shallow, deep in itertools.pairwise(depths):
        cost = paired(by_depth[shallow], by_depth[deep])
        sentences.append(f"Going from {shallow} to {deep} {_costs(cost)}.")
    return " ".join(sentences)


def why(rows: Sequence[TaskRow], depths: Sequence[int], unit: str) -> str:
    """The correlation of the accuracy that depth costs a task and its shift from the first task.

    unit: stage or block, which the depths count.
    """
    later = rows[1:]
    if len(depths) < 2 or not later:
        return ""
    most = max(later, key=lambda row: row.lost)
    text = (f"Freezing {depths[-1]} {unit}s instead of {depths[0]} costs "
            + (f"task '{most.name}' most ({in_points(most.lost)}; {percent(most.shift, 0)} of the "
               "variance of its features lies outside of the directions in which the first task "
               "varies). " if most.lost > 0 else "no later task accuracy. "))
    if len(later) < ENOUGH_TASKS:
        return text + f"{len(later)} later tasks are too few for a correlation."
    shifts, losses = [row.shift for row in later], [row.lost for row in later]
    if len(set(shifts)) == 1 or len(set(losses)) == 1:
        return text + "All later tasks have the same shift, or lose the same accuracy."
    correlation = stats.spearmanr(shifts, losses)
    sense = ("Tasks that differ more from the first lose more" if correlation.statistic > 0 else
             "Tasks that differ more from the first do not lose more")
    doubt = "" if correlation.pvalue < 1 - CONFIDENCE else ", which is not significant"
    return (f"{text}{sense}: rank correlation {correlation.statistic:+.2f} over {len(later)} "
            f"tasks{doubt}.")


def forecast_order(cells: Sequence[Mapping[str, Any]]) -> str:
    """Whether the forecast from two tasks ranked the depths as they were measured; empty where it
    expects the same of all of them.
    """
    ours = [cell for cell in cells if cell["strategy"] == OURS]
    kept = {cell["depth"]: cell["forecast_kept"] for cell in ours
            if cell["forecast_kept"] is not None}
    if len(set(kept.values())) < 2:
        return ""
    acc = {depth: float(np.mean([cell["acc"] for cell in ours if cell["depth"] == depth]))
           for depth in kept}
    forecast, measured = (sorted(kept, key=lambda depth: -values[depth]) for values in (kept, acc))
    words = ("in the order that was measured" if forecast == measured else
             f"in another order than was measured ({_listed(measured)})")
    shares = "; ".join(f"depth {depth}: {percent(kept[depth], 0)}" for depth in sorted(kept))
    return (f"The forecast from the first two tasks, before any training, ranked the depths "
            f"{words}: {_listed(forecast)}, the best first (predicted share of the accuracy above "
            f"chance that remains: {shares}).")


def noise(cells: Sequence[Mapping[str, Any]], depth: int, unit: str) -> str:
    """The effect of corrupted images on the hypernetwork and on latent replay; empty for clean
    streams. unit: stage or block, which the depth counts.
    """
    tasks = cells[0]["tasks"]
    noisy = [index for index, task in enumerate(tasks) if task["transform"] != "none"]
    if not noisy:
        return ""
    sentences = []
    for strategy, name in ((OURS, "The hypernetwork"), ("latent_replay", "latent replay")):
        mine = [cell for cell in cells if cell["strategy"] == strategy and cell["depth"] == depth]
        if not mine:
            return ""
        learned = np.mean([[cell["accuracy_matrix"][i][i] for i in noisy] for cell in mine])
        clean = [i for i in range(len(tasks)) if i not in noisy]
        kept = np.mean([[cell["accuracy_matrix"][-1][i] for i in clean] for cell in mine])
        before = np.mean([[cell["accuracy_matrix"][i][i] for i in clean] for cell in mine])
        sentences.append(
            f"{name} has an accuracy of {percent(float(learned))} on the corrupted tasks when they "
            f"are learned, and at the end {percent(float(kept))} on the clean ones (when learned: "
            f"{percent(float(before))})")
    return f"With {frozen(depth, unit)}: " + "; ".join(sentences) + "."


def against(rows: Sequence[Row]) -> list[str]:
    """The depths at which another strategy is better or worse than the hypernetwork."""
    if all(row.acc.low is None for row in rows):
        return ["One seed does not show which is better; the table has its numbers."]
    sentences = []
    for label in dict.fromkeys(row.label for row in rows if row.ahead is not None):
        parts: dict[str, list[str]] = {"better": [], "worse": [], "no significant difference": []}
        for row in rows:
            if row.label != label or row.ahead is None:
                continue
            place = ("no significant difference" if not row.ahead.excludes_zero else
                     "worse" if row.ahead.mean > 0 else "better")
            amount = f" by {points(abs(row.ahead.mean))}" if row.ahead.excludes_zero else ""
            parts[place].append(f"at depth {row.depth}{amount}")
        sentences.append(f"{label}: " + "; ".join(f"{place} {', '.join(where)}"
                                             for place, where in parts.items() if where))
    return sentences


def frozen(depth: int, unit: str) -> str:
    """A depth in words. unit: stage or block."""
    return "nothing frozen" if depth == 0 else f"{depth} {unit}{'s' * (depth > 1)} frozen"


def _costs(cost: Interval) -> str:
    word = "costs" if cost.mean > 0 else "gains"
    doubt = "" if cost.excludes_zero else (
        " (one seed)" if cost.low is None else ", not significant")
    return f"{word} {points(abs(cost.mean))}{margin(cost.mean, cost.low)} points{doubt}"


def _listed(depths: Sequence[int]) -> str:
    return ", ".join(map(str, depths))
