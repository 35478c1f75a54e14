"""What a pack's cells log, in plain words: how deep one can freeze and why, what noise does, and
where another strategy is the better choice.

Pure: cells and rows in, sentences and small tables out.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from partialhn.benchmarks.comparison import Row
from partialhn.evaluation.intervals import CONFIDENCE, Interval, paired

OURS = "partial_hn"
ENOUGH_TASKS = 4
"""Fewer later tasks say nothing of how two of their properties go together."""


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """One task: how it differs from the first, and what freezing deeper costs it."""

    name: str
    transform: str
    shift: float
    """`partialhn.evaluation.forecast.task_shift` in the features of the deepest depth, 0 to 1."""
    accuracy: tuple[float, ...]
    """The hypernetwork's accuracy right after the task, by depth from the shallowest, mean over
    seeds."""

    @property
    def lost(self) -> float:
        """Accuracy that the deepest depth loses against the shallowest."""
        return self.accuracy[0] - self.accuracy[-1]


def depths_of(cells: Sequence[Mapping[str, Any]]) -> list[int]:
    """Depths at which the hypernetwork was learned."""
    return sorted({cell["depth"] for cell in cells if cell["strategy"] == OURS})


def task_rows(cells: Sequence[Mapping[str, Any]]) -> list[TaskRow]:
    """A row for each task; the first is what the trunk was trained on."""
    depths = depths_of(cells)
    ours = [cell for cell in cells if cell["strategy"] == OURS]
    deepest = next(cell for cell in ours if cell["depth"] == depths[-1])
    learned = [[np.mean([cell["accuracy_matrix"][task][task] for cell in ours
                         if cell["depth"] == depth]) for depth in depths]
               for task in range(len(deepest["tasks"]))]
    return [TaskRow(task["name"], task["transform"], shift, tuple(map(float, accuracy)))
            for task, shift, accuracy in zip(deepest["tasks"], deepest["task_shift"], learned,
                                             strict=True)]


def how_deep(cells: Sequence[Mapping[str, Any]]) -> str:
    """What each further frozen stage costs the hypernetwork."""
    depths, by_depth = depths_of(cells), {}
    for depth in depths:
        by_depth[depth] = {cell["seed"]: cell["acc"] for cell in cells
                           if cell["strategy"] == OURS and cell["depth"] == depth}
    best = max(depths, key=lambda depth: Interval.of(list(by_depth[depth].values())).mean)
    said = [f"The hypernetwork is most accurate with {stages(best)}: "
            f"{percent(Interval.of(list(by_depth[best].values())))}."]
    for shallow, deep in itertools.pairwise(depths):
        cost = paired(by_depth[shallow], by_depth[deep])
        said.append(f"Going from {shallow} to {deep} {_costs(cost)}.")
    return " ".join(said)


def why(rows: Sequence[TaskRow], depths: Sequence[int]) -> str:
    """How what depth costs a task goes together with how it differs from the first."""
    later = rows[1:]
    if len(depths) < 2 or not later:
        return ""
    most = max(later, key=lambda row: row.lost)
    said = (f"Freezing {depths[-1]} stages in place of {depths[0]} costs task '{most.name}' most "
            f"({100 * most.lost:.1f} points; {100 * most.shift:.0f} % of its features' spread lies "
            "outside of the directions in which the first task varies). ")
    if len(later) < ENOUGH_TASKS:
        return said + f"{len(later)} later tasks are too few to say more."
    found = stats.spearmanr([row.shift for row in later], [row.lost for row in later])
    if np.isnan(found.statistic):
        return said + "All later tasks differ from the first, or lose, alike."
    sense = ("Tasks that differ more from the first lose more" if found.statistic > 0 else
             "Tasks that differ more from the first do not lose more")
    sure = "" if found.pvalue < 1 - CONFIDENCE else ", which chance explains as well"
    return (f"{said}{sense}: rank correlation {found.statistic:+.2f} over {len(later)} tasks"
            f"{sure}.")


def forecast_said(cells: Sequence[Mapping[str, Any]]) -> str:
    """Whether the forecast from two tasks had put the depths in the order that was measured."""
    ours = [cell for cell in cells if cell["strategy"] == OURS]
    kept = {cell["depth"]: cell["forecast_kept"] for cell in ours
            if cell["forecast_kept"] is not None}
    if len(kept) < 2 or not any(kept.values()):
        return ""
    acc = {depth: float(np.mean([cell["acc"] for cell in ours if cell["depth"] == depth]))
           for depth in kept}
    forecast, measured = (sorted(kept, key=lambda depth: -values[depth]) for values in (kept, acc))
    words = ("in the order that was measured" if forecast == measured else
             f"in another order than was measured ({_listed(measured)})")
    shares = "; ".join(f"depth {depth}: {100 * kept[depth]:.0f} %" for depth in sorted(kept))
    return (f"The forecast from the first two tasks, before any training, put the depths {words}: "
            f"{_listed(forecast)}, the best first (it expects to keep: {shares}).")


def noise(cells: Sequence[Mapping[str, Any]], depth: int) -> str:
    """The effect of changed images on hypernetwork and latent replay; empty for clean streams."""
    tasks = cells[0]["tasks"]
    noisy = [index for index, task in enumerate(tasks) if task["transform"] != "none"]
    if not noisy:
        return ""
    said = []
    for strategy, name in ((OURS, "The hypernetwork"), ("latent_replay", "latent replay")):
        mine = [cell for cell in cells if cell["strategy"] == strategy and cell["depth"] == depth]
        if not mine:
            return ""
        learned = np.mean([[cell["accuracy_matrix"][i][i] for i in noisy] for cell in mine])
        clean = [i for i in range(len(tasks)) if i not in noisy]
        kept = np.mean([[cell["accuracy_matrix"][-1][i] for i in clean] for cell in mine])
        before = np.mean([[cell["accuracy_matrix"][i][i] for i in clean] for cell in mine])
        said.append(f"{name} learns the changed tasks to {100 * learned:.1f} %, and after them "
                    f"answers the clean ones to {100 * kept:.1f} % (before: "
                    f"{100 * before:.1f} %)")
    return f"With {stages(depth)}: " + "; ".join(said) + "."


def against(rows: Sequence[Row]) -> list[str]:
    """Where another strategy is ahead or behind, as far as the seeds can tell."""
    if all(row.acc.low is None for row in rows):
        return ["One seed cannot tell; see the table for what it gave."]
    said = []
    for label in dict.fromkeys(row.label for row in rows if row.ahead is not None):
        parts: dict[str, list[str]] = {"ahead": [], "behind": [], "cannot be told apart": []}
        for row in rows:
            if row.label != label or row.ahead is None:
                continue
            place = ("cannot be told apart" if not row.ahead.excludes_zero else
                     "behind" if row.ahead.mean > 0 else "ahead")
            margin = f" by {abs(100 * row.ahead.mean):.1f}" if row.ahead.excludes_zero else ""
            parts[place].append(f"at depth {row.depth}{margin}")
        said.append(f"{label}: " + "; ".join(f"{place} {', '.join(where)}"
                                             for place, where in parts.items() if where))
    return said


def stages(depth: int) -> str:
    """A depth in words."""
    return "nothing frozen" if depth == 0 else f"{depth} stage{'s' * (depth > 1)} frozen"


def percent(value: Interval) -> str:
    """Per cent, with the half width of the interval where there is one."""
    return f"{100 * value.mean:.1f}{half(value)} %"


def half(value: Interval) -> str:
    """Points on each side; empty for a single seed."""
    return "" if value.low is None else f" ± {100 * (value.mean - value.low):.1f}"


def _costs(cost: Interval) -> str:
    word = "costs" if cost.mean > 0 else "gains"
    doubt = "" if cost.excludes_zero else (
        " (one seed)" if cost.low is None else ", within what the seeds can tell apart")
    return f"{word} {abs(100 * cost.mean):.1f}{half(cost)} points{doubt}"


def _listed(depths: Sequence[int]) -> str:
    return ", ".join(map(str, depths))
