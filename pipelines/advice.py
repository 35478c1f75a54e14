"""From a search's records to a decision: front, depths, recommendation, and how sure it is.

Decisions use held-out images alone: for each depth the mean of its best trial run again under
seeds that the search did not see. Test images are reported beside them and decide nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scipy import stats

from partialhn.backbone import STAGE_NAMES
from pipelines.search_settings import Objective
from pipelines.search_state import Measured, TrialRecord

CONFIDENCE = 0.95
FRONT = ("seconds", "feature_bytes", "serving_macs")
"""Costs of the front, each the smaller the better, against accuracy."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t); none for a single value."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> "Interval":
        """The interval of some values, at least one."""
        count, mean = len(values), sum(values) / len(values)
        if count == 1:
            return Interval(mean, None, None, tuple(values))
        spread = math.sqrt(sum((value - mean)**2 for value in values) / (count - 1) / count)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread
        return Interval(mean, mean - half, mean + half, tuple(values))


@dataclasses.dataclass(frozen=True)
class DepthResult:
    """What the search knows of one depth."""

    depth: int
    best: TrialRecord
    """Of the search."""
    finals: tuple[TrialRecord, ...]
    """The best one again, in order of seeds."""
    bounds: tuple[TrialRecord, ...]
    """One separate head a task under the same seeds."""
    counts: Mapping[str, int]
    """Trials of the search by status."""

    @property
    def runs(self) -> list[Measured]:
        """What the decision looks at: the final runs, or the search's own where there are none."""
        return [_measured(each) for each in self.finals or (self.best,)]

    @property
    def accuracy(self) -> Interval:
        """Held-out accuracy over seeds."""
        return Interval.of([run.accuracy for run in self.runs])

    @property
    def seconds(self) -> float:
        """Mean cost of training the stream."""
        return sum(run.seconds for run in self.runs) / len(self.runs)

    @property
    def per_task(self) -> list[float]:
        """Mean held-out accuracy of each task at the end."""
        rows = [run.rows[-1] for run in self.runs]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def lost(self) -> Interval | None:
        """How far it stays behind separate heads, seed by seed; None without them."""
        pairs = {each.plan.seed: _measured(each).accuracy for each in self.bounds}
        gaps = [pairs[each.plan.seed] - _measured(each).accuracy for each in self.finals
                if each.plan.seed in pairs]
        return Interval.of(gaps) if gaps else None


def _measured(record: TrialRecord) -> Measured:
    assert record.measured is not None
    return record.measured


def stage_name(depth: int) -> str:
    """How a depth is called in a sentence: freezing ..."""
    if depth == 0:
        return "nothing"
    return f"through {STAGE_NAMES[depth - 1]}" if depth < len(STAGE_NAMES) else (
        "everything but the classifier")


def results_by_depth(records: Sequence[TrialRecord],
                     score: Callable[[Measured], float]) -> list[DepthResult]:
    """The best finished trial of each depth, with its final runs; a depth may have none."""
    found = []
    for depth in sorted({each.plan.depth for each in records}):
        here = [each for each in records if each.plan.depth == depth]
        trials = [each for each in here if each.plan.kind == "search"]
        finished = [each for each in trials if each.finished]
        if not finished:
            continue
        best = max(finished, key=lambda each: (score(_measured(each)), each.plan.id))
        again = {kind: tuple(sorted((each for each in here if each.plan.kind == kind
                                     and each.finished and _origin(each) == best.plan.id),
                                    key=lambda each: each.plan.seed))
                 for kind in ("final", "bound")}
        counts = {status: sum(each.status == status for each in trials)
                  for status in ("finished", "pruned", "failed")}
        found.append(DepthResult(depth, best, again["final"], again["bound"], counts))
    return found


def _origin(record: TrialRecord) -> str:
    """The search's trial that a final run or a bound repeats: final-0012-s1 -> 0012."""
    return record.plan.id.split("-")[1]


def front(records: Sequence[TrialRecord]) -> list[str]:
    """Ids of the search's finished trials that no other one equals or beats in everything and
    beats in something: accuracy, and each of `FRONT`.
    """
    points = {each.plan.id: (_measured(each).accuracy,
                             *(-float(getattr(_measured(each), cost)) for cost in FRONT))
              for each in records if each.finished and each.plan.kind == "search"}
    return [name for name, own in points.items()
            if not any(other != own and all(a >= b for a, b in zip(other, own, strict=True))
                       for other in points.values())]


def choose(accuracy: Mapping[int, float], cost: Mapping[int, float], objective: Objective,
           max_loss: float) -> int:
    """The depth that the objective prefers.

    accuracy: the most accurate. cost: the cheapest of those within max_loss of the most accurate.
    balanced: the largest accuracy - max_loss * log2(cost), so that each doubling of the cost must
    buy max_loss. Where two are equal, the cheaper, then the deeper.
    """
    best = max(accuracy.values())
    depths = [depth for depth in accuracy
              if objective != "cost" or accuracy[depth] >= best - max_loss - 1e-12]
    value: dict[int, float] = {
        depth: {"accuracy": accuracy[depth], "cost": -cost[depth],
                "balanced": accuracy[depth] - max_loss * math.log2(cost[depth])}[objective]
        for depth in depths}
    return max(depths, key=lambda depth: (value[depth], -cost[depth], depth))


def agreement(results: Sequence[DepthResult], cost: Mapping[int, float], objective: Objective,
              max_loss: float) -> dict[int, int]:
    """How many seeds, each taken alone, would recommend each depth."""
    votes: dict[int, int] = {}
    seeds = min(len(each.finals) for each in results)
    for index in range(seeds):
        accuracy = {each.depth: each.runs[index].accuracy for each in results}
        depth = choose(accuracy, cost, objective, max_loss)
        votes[depth] = votes.get(depth, 0) + 1
    return votes


def more_search(scores: Sequence[float]) -> dict[str, float] | None:
    """What more trials would bring, from those that were run; None for fewer than four.

    With E(k) the expected best of k of the n trials drawn at random, the last doubling brought
    E(n) - E(n/2) and the one before E(n/2) - E(n/4). The next is expected to bring the last one
    shrunk by their ratio, or by nothing where they do not shrink.
    """
    count = len(scores)
    if count < 4:
        return None
    last = expected_best(scores, count) - expected_best(scores, count // 2)
    before = expected_best(scores, count // 2) - expected_best(scores, count // 4)
    ratio = min(1.0, last / before) if before > 0 else 1.0
    return {"trials": count, "last_doubling": last, "next_doubling": last * ratio}


def expected_best(scores: Sequence[float], count: int) -> float:
    """E(k): mean over all ways to draw k of the scores of the largest drawn."""
    ordered = sorted(scores)
    ways = math.comb(len(ordered), count)
    return sum(score * math.comb(index, count - 1) / ways for index, score in enumerate(ordered))


def rank_correlation(forecast: Sequence[Mapping[str, Any]],
                     results: Sequence[DepthResult]) -> float | None:
    """Spearman's correlation of the forecast and the measured accuracy; None below 3 depths."""
    kept = {each["depth"]: each["kept"] for each in forecast}
    pairs = [(kept[each.depth], each.accuracy.mean) for each in results if each.depth in kept]
    if len(pairs) < 3:
        return None
    value = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    return None if math.isnan(value) else value
