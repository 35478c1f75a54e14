"""How sure the held-out images and the seeds make the accuracies of a search."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partialhn.evaluation.certainty import Answers, Estimate, difference, mean_accuracy
from pipelines.advice.decide import DepthResult
from pipelines.search.state import Measured, TrialRecord

Runs = Mapping[int, Measured]
"""Measurements by seed."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out images of a stream."""

    images_T: tuple[int, ...]
    """Held-out images of each task."""
    chance: float
    """Mean accuracy of guessing over the tasks."""

    @staticmethod
    def of(settings: Mapping[str, Any], survey: Mapping[str, Any]) -> "HeldOut":
        """The images that a survey counted, for the tasks of the settings."""
        guesses = [1 / len(task["classes"]) for task in settings["tasks"]]
        if settings["options"].get("unknown_task"):  # among the classes of all tasks
            guesses = [1 / len({name for task in settings["tasks"] for name in task["classes"]})]
        return HeldOut(tuple(survey["held_out_images"]), sum(guesses) / len(guesses))

    @property
    def images(self) -> int:
        """Held-out images of all tasks."""
        return sum(self.images_T)

    def accuracy(self, result: DepthResult) -> Estimate:
        """Held-out accuracy of a depth."""
        return mean_accuracy([run.rows[-1] for run in result.runs], self.images_T)

    def heads(self, result: DepthResult) -> Estimate | None:
        """Held-out accuracy of separate heads; None where they were not trained."""
        runs = _by_seed(result.baselines)
        return mean_accuracy([run.rows[-1] for run in runs.values()],
                             self.images_T) if runs else None

    def above_chance(self, result: DepthResult) -> Estimate:
        """Held-out accuracy of a depth minus that of guessing."""
        found = self.accuracy(result)
        return dataclasses.replace(found, mean=found.mean - self.chance, values=tuple(
            value - self.chance for value in found.values))

    def ahead(self, one: DepthResult, other: DepthResult) -> Estimate:
        """Accuracy of one depth minus that of another, paired by seed and by image."""
        return self._ahead(_runs(one), _runs(other))

    def ahead_by_task(self, one: DepthResult, other: DepthResult) -> list[Estimate]:
        """`ahead` on each task alone."""
        return [HeldOut((count,), self.chance)._ahead(_of_task(_runs(one), task),
                                                      _of_task(_runs(other), task))
                for task, count in enumerate(self.images_T)]

    def behind_heads(self, result: DepthResult) -> Estimate | None:
        """Accuracy behind separate heads; None where they were not trained under these seeds."""
        own, heads = _by_seed(result.finals), _by_seed(result.baselines)
        return self._ahead(heads, own) if own.keys() & heads.keys() else None

    def ridge_ahead(self, result: DepthResult, ridge: float) -> Estimate:
        """Accuracy of ridge regression, which has no seed, minus that of a depth."""
        rows = [run.rows[-1] for run in result.runs]
        return difference([[ridge] * len(self.images_T)] * len(rows), rows, self.images_T)

    def _ahead(self, one: Runs, other: Runs) -> Estimate:
        seeds = sorted(one.keys() & other.keys())
        if not seeds:  # one of them has no run under other seeds yet
            means = [[list(np.mean([run.rows[-1] for run in runs.values()], 0))]
                     for runs in (one, other)]
            return difference(means[0], means[1], self.images_T)
        rows = [[runs[seed].rows[-1] for seed in seeds] for runs in (one, other)]
        return difference(rows[0], rows[1], self.images_T,
                          self._answers(one, seeds), self._answers(other, seeds))

    def _answers(self, runs: Runs, seeds: Sequence[int]) -> Answers | None:
        answers = [found for seed in seeds
                   if (found := runs[seed].answers(self.images_T)) is not None]
        return answers if len(answers) == len(seeds) else None


def _runs(result: DepthResult) -> Runs:
    return _by_seed(result.finals or (result.best,))


def _by_seed(records: Sequence[TrialRecord]) -> dict[int, Measured]:
    return {each.plan.seed: each.measured for each in records if each.measured is not None}


def _of_task(runs: Runs, task: int) -> dict[int, Measured]:
    """The same runs, as if the stream had this task alone."""
    return {seed: dataclasses.replace(run, rows=((run.rows[-1][task],),), right=None if
                                      run.right is None else (run.right[task],))
            for seed, run in runs.items()}
