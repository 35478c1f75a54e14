"""From the records of a search to a decision: Pareto front, depths, recommendation, confidence.

Decisions use held-out images alone: for each depth the mean of its best trial run again under
seeds that the search did not use. Accuracy on test images is only reported.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from partialhn.evaluation.intervals import CONFIDENCE, Interval
from pipelines.search.settings import Objective
from pipelines.search.state import Measured, TrialRecord

FRONT = ("seconds", "feature_bytes", "serving_macs")
"""Costs of the Pareto front; smaller is better."""


@dataclasses.dataclass(frozen=True)
class DepthResult:
    """The results of the search at one depth."""

    depth: int
    best: TrialRecord
    """The best trial of the search."""
    finals: tuple[TrialRecord, ...]
    """The best trial under other seeds, in order of seeds."""
    baselines: tuple[TrialRecord, ...]
    """Separate heads under the same seeds."""
    counts: Mapping[str, int]
    """Number of trials of the search by status."""

    @property
    def runs(self) -> list[Measured]:
        """The runs that the decision uses: the final runs, or the best trial without them."""
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


def _measured(record: TrialRecord) -> Measured:
    assert record.measured is not None
    return record.measured


def results_by_depth(records: Sequence[TrialRecord],
                     score: Callable[[Measured], float]) -> list[DepthResult]:
    """The best finished trial of each depth, with its final runs; a depth may have none."""
    results = []
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
        results.append(DepthResult(depth, best, again["final"], again["bound"], counts))
    return results


def _origin(record: TrialRecord) -> str:
    """The search's trial that a final run or a baseline repeats: final-0012-s1 -> 0012."""
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


def noise(results: Sequence[DepthResult]) -> float:
    """The largest difference of two depths' accuracies that is explained by chance (95 %,
    two-sided t).

    All final runs and baselines have the same seeds, so an effect that a seed has on all of them is
    no difference between depths. The residuals of the model accuracy = run + seed are pooled over
    all runs, since a few seeds of one depth say little: t * s * sqrt(2 / n), with n seeds and
    (runs - 1)(n - 1) degrees of freedom. 0 with fewer than two depths or two seeds.
    """
    finals = [_by_seed(each.finals) for each in results if each.finals]
    seeds = sorted(set.intersection(*map(set, finals))) if finals else []
    if len(finals) < 2 or len(seeds) < 2:
        return 0.0
    baselines = [_by_seed(each.baselines) for each in results]
    accuracy_RS = np.array([[row[seed] for seed in seeds] for row in finals + baselines
                            if set(seeds) <= set(row)])
    left_RS = (accuracy_RS - accuracy_RS.mean(0) - accuracy_RS.mean(1, keepdims=True)
               + accuracy_RS.mean())
    freedom = (len(accuracy_RS) - 1) * (len(seeds) - 1)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
                 * np.sqrt((left_RS**2).sum() / freedom * 2 / len(seeds)))


def _by_seed(records: Sequence[TrialRecord]) -> dict[int, float]:
    return {each.plan.seed: _measured(each).accuracy for each in records}


def choose(accuracy: Mapping[int, float], cost: Mapping[int, float], objective: Objective,
           max_loss: float, margin: float = 0.0) -> int:
    """The depth that the objective prefers.

    accuracy: the most accurate. cost: the cheapest of those within max_loss of the most accurate.
    balanced: the largest accuracy - max_loss * log2(cost), so that each doubling of the cost must
    gain max_loss. A cheaper depth is chosen instead where its accuracy is within `margin` of that
    depth's, so that the seeds do not show that it is less accurate: the cheapest, then the deepest.
    """
    best = max(accuracy.values())
    depths = [depth for depth in accuracy
              if objective != "cost" or accuracy[depth] >= best - max_loss - 1e-12]
    value: dict[int, float] = {
        depth: {"accuracy": accuracy[depth], "cost": -cost[depth],
                "balanced": accuracy[depth] - max_loss * math.log2(cost[depth])}[objective]
        for depth in depths}
    first = max(depths, key=lambda depth: (value[depth], -cost[depth], depth))
    if objective == "cost":
        return first
    level = [depth for depth in depths if cost[depth] <= cost[first]
             and accuracy[depth] >= accuracy[first] - margin]
    return max(level, key=lambda depth: (-cost[depth], depth))


def agreement(results: Sequence[DepthResult], cost: Mapping[int, float], objective: Objective,
              max_loss: float) -> dict[int, int]:
    """Number of seeds that, taken alone, recommend each depth; of those that every depth has."""
    votes: dict[int, int] = {}
    finals = {each.depth: _by_seed(each.finals) for each in results}
    for seed in sorted(set.intersection(*map(set, finals.values()))):
        depth = choose({depth: row[seed] for depth, row in finals.items()}, cost, objective,
                       max_loss)
        votes[depth] = votes.get(depth, 0) + 1
    return votes


def more_search(scores: Sequence[float]) -> dict[str, float] | None:
    """The accuracy that more trials would gain, estimated from those that ran; None below four.

    With E(k) the expected best of k of the n trials drawn at random, the last doubling gained
    E(n) - E(n/2) and the one before E(n/2) - E(n/4). The next doubling is expected to gain the last
    gain times the ratio of these two, and at most the last gain.
    """
    count = len(scores)
    if count < 4:
        return None
    last = expected_best(scores, count) - expected_best(scores, count // 2)
    before = expected_best(scores, count // 2) - expected_best(scores, count // 4)
    ratio = min(1.0, last / before) if before > 0 else 1.0
    return {"trials": count, "last_doubling": last, "next_doubling": last * ratio}


def expected_best(scores: Sequence[float], count: int) -> float:
    """E(k): the largest of k scores drawn without replacement, averaged over all draws."""
    ordered = sorted(scores)
    ways = math.comb(len(ordered), count)
    return sum(score * math.comb(index, count - 1) / ways for index, score in enumerate(ordered))


def rank_correlation(forecast: Sequence[Mapping[str, Any]],
                     results: Sequence[DepthResult]) -> float | None:
    """Spearman's correlation of the forecast and the measured accuracy; None below 3 depths with a
    forecast, and where one of the two is the same at all of them.
    """
    expected = {each["depth"]: each.get("expected", each["kept"]) for each in forecast}
    pairs = [(expected[each.depth], each.accuracy.mean) for each in results
             if expected.get(each.depth) is not None]
    if len(pairs) < 3 or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    return float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
