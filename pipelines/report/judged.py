"""The report's judgement of every task: beyond luck, beside ridge regression, and by the gate."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partialhn.evaluation.certainty import (
    Estimate,
    difference,
    mean_accuracy,
    share_interval,
)
from partialhn.numbers import in_points, percent
from pipelines.gate import TOLERANCE, Decision, GateFacts, Policy, decide, p_value
from pipelines.report.facts import Facts

MOST = 100_000
"""The search for a sufficient number of test images ends here."""


@dataclasses.dataclass(frozen=True)
class BesideRidge:
    """A task's head beside ridge regression on the same features, and on the same images."""

    ridge: float
    """Accuracy of ridge regression."""
    ahead: Estimate
    """Accuracy of the head minus that of ridge regression."""
    images: str
    """Name of the images: held-out images or test images."""
    solved: bool = False
    """Whether the task's head is ridge regression itself."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """One task, as the report judges it; None is unknown."""

    task: str
    accuracy: float
    """Test accuracy at the end."""
    best: float
    """Its best test accuracy since it was learned."""
    images: int | None
    chance: float | None
    interval: tuple[float, float] | None
    """95 % interval of the accuracy."""
    decision: Decision | None
    """The answer of the gate, if the task were new with this accuracy and had lost so much."""
    ridge: BesideRidge | None

    @property
    def refused(self) -> bool:
        """Whether the gate would refuse the task."""
        return self.decision is not None and not self.decision.passed

    @property
    def lucky(self) -> bool:
        """Whether guessing may explain its accuracy, by the policy's limits."""
        return self.decision is not None and (
            self._little_above(self.decision.policy) or self._likely(self.decision.policy))

    def refusals(self) -> list[str]:
        """The reasons for which the gate would refuse it, in the words of the report."""
        if self.decision is None or self.chance is None:
            return []
        policy, lost, found = self.decision.policy, self.best - self.accuracy, []
        if policy.min_accuracy_new is not None and (
                self.accuracy < policy.min_accuracy_new - TOLERANCE):
            found.append(f"its accuracy is {percent(self.accuracy)}, wanted at least "
                         f"{percent(policy.min_accuracy_new)}")
        if self._little_above(policy):
            found.append(f"it is {in_points(self.accuracy - self.chance)} above guessing, wanted "
                         f"at least {in_points(policy.min_above_chance or 0)}")
        if self._likely(policy):
            found.append(f"guessing gets as many of {self.images:,} test images right with a "
                         f"probability of {self._p_value():.2g}, allowed at most "
                         f"{policy.max_p_value:g}")
        if policy.max_loss_on_earlier_task is not None and (
                lost > policy.max_loss_on_earlier_task + TOLERANCE):
            found.append(f"it lost {in_points(lost)} since its best, allowed at most "
                         f"{in_points(policy.max_loss_on_earlier_task)}")
        return found or ([] if self.decision.passed else list(self.decision.reasons))

    def more_images(self) -> int | None:
        """Test images, beside those measured, with which this accuracy would not be luck by the
        policy; None where it is not the number of images that is missing.
        """
        if self.decision is None or self.images is None or self.chance is None:
            return None
        policy = self.decision.policy
        if not self._likely(policy) or self._little_above(policy):
            return None
        from scipy.special import bdtrc  # takes a quarter of a second to import

        count_n = np.arange(self.images, MOST)
        right_n = np.round(self.accuracy * count_n)
        enough_n = bdtrc(right_n - 1, count_n, self.chance) <= policy.max_p_value
        return int(np.argmax(enough_n)) if enough_n.any() else None

    def _little_above(self, policy: Policy) -> bool:
        return policy.min_above_chance is not None and self.chance is not None and (
            self.accuracy - self.chance < policy.min_above_chance - TOLERANCE)

    def _likely(self, policy: Policy) -> bool:
        return (policy.min_above_chance is not None and policy.max_p_value is not None
                and self._p_value() > policy.max_p_value)

    def _p_value(self) -> float:
        assert self.images is not None
        assert self.chance is not None
        return p_value(self.accuracy, self.chance, self.images)


def policy_of(result: Mapping[str, Any]) -> Policy:
    """The policy that a report judges by: that of the stream, or the default.

    Limits on what a report does not measure anew are the gate's alone.
    """
    fields = result.get("policy") or {}
    names = {field.name for field in dataclasses.fields(Policy)}
    policy = Policy(**{key: value for key, value in fields.items() if key in names})
    return dataclasses.replace(policy, min_against_linear_probe=None, max_seconds=None)


def judge(facts: Facts) -> list[Judged]:
    """Every task of a result, in order."""
    policy = policy_of(facts.result)
    last = {epoch.get("task_index"): epoch for epoch in facts.result.get("epochs") or []}
    reviews = {each.get("index"): each for each in facts.result.get("review") or []}
    found = []
    for index, (name, task) in enumerate(zip(facts.tasks, facts.details, strict=True)):
        accuracy = float(facts.accuracy_TT[-1, index])
        images, classes = task.get("test_images") or None, len(task.get("classes") or ())
        chance = 1 / classes if classes else None
        found.append(Judged(
            name, accuracy, accuracy + facts.metrics.forgetting_per_task[index], images, chance,
            share_interval(accuracy, images) if images else None,
            _decision(facts, index, policy) if images and classes else None,
            _beside_ridge(task, last.get(index) or {}, reviews.get(index) or {})))
    return found


def _decision(facts: Facts, index: int, policy: Policy) -> Decision:
    task, name = facts.details[index], facts.tasks[index]
    after = float(facts.accuracy_TT[-1, index])
    best = after + facts.metrics.forgetting_per_task[index]
    return decide(policy, GateFacts(
        name, len(task["classes"]), {name: after}, {name: best}, task["test_images"],
        bytes_per_task=facts.result.get("bytes_per_task")))


def _beside_ridge(task: Mapping[str, Any], epoch: Mapping[str, Any],
                  review: Mapping[str, Any]) -> BesideRidge | None:
    """On test images where the review measured it, otherwise on held-out images."""
    if epoch.get("solved"):
        right = float(epoch.get("ridge_accuracy") or 0.0)
        return BesideRidge(right, Estimate(0.0, (0.0,), 0.0, 0), "held-out images", True)
    measured, images = review.get("ridge"), review.get("images")
    if measured and images:
        alone, other = measured["only_ours"], measured["only_ridge"]
        # two images more, one for each side, so that equal answers to few images prove nothing
        shares, mean = ((alone + other) * images + 2) / (images + 2), alone - other
        variance = (shares - (mean * images / (images + 2))**2) / (images + 2)
        return BesideRidge(measured["accuracy"], Estimate(mean, (mean,), variance, images),
                           "test images")
    ridge, ours = epoch.get("ridge_accuracy"), epoch.get("validation_accuracy")
    count = task.get("validation_images")
    if ridge is None or ours is None or not count:
        return None
    return BesideRidge(ridge, difference([[ours]], [[ridge]], [count]), "held-out images")


def mean_interval(judged: Sequence[Judged]) -> tuple[float, float] | None:
    """The 95 % interval of the mean accuracy over tasks, through their test images."""
    images = [each.images or 0 for each in judged]
    if not all(images):
        return None
    if len(judged) == 1:
        return judged[0].interval
    found = mean_accuracy([[each.accuracy for each in judged]], images)
    return max(0.0, found.low), min(1.0, found.high)


def policy_words(policy: Policy) -> str:
    """The limits of a policy in words."""
    parts = []
    if policy.min_above_chance is not None:
        parts.append(f"every task at least {100 * policy.min_above_chance:g} points above guessing")
        if policy.max_p_value is not None:
            parts.append(f"with a p-value of guessing of at most {policy.max_p_value:g}")
    if policy.min_accuracy_new is not None:
        parts.append(f"accuracy of at least {percent(policy.min_accuracy_new, 0)}")
    if policy.max_loss_on_earlier_task is not None:
        parts.append("no task loses more than "
                     f"{100 * policy.max_loss_on_earlier_task:g} points from its best")
    if policy.max_bytes_per_task is not None:
        parts.append(f"a task adds at most {policy.max_bytes_per_task:,} bytes")
    return ", ".join(parts) or "no limits"
