"""The gate: decides from a policy and measured facts whether a new version becomes champion.

Nothing is measured or stored here. If a limit is set but its fact was not measured, the version
fails: missing measurements never let a version pass.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partialhn.config import build
from partialhn.errors import InputError
from partialhn.yaml_text import read_yaml

TOLERANCE = 1e-9
"""Tolerance for rounding of decimal fractions; far less than one image of any test set."""
LISTED = 32
"""Most tasks of which a decision keeps every row."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """The limits for a new version; None means no limit. Accuracies are shares, 0 to 1."""

    max_loss_on_earlier_task: float | None = 0.02
    """Largest loss of accuracy of any earlier task, compared with its best."""
    min_accuracy_new: float | None = None
    """Smallest accuracy of the new task."""
    min_above_chance: float | None = 0.1
    """Smallest accuracy of the new task minus that of guessing among its classes."""
    max_p_value: float | None = 0.01
    """Largest p-value of the hypothesis that the new task's predictions are guessed: the
    probability that guessing gets as many test images right. Only used with `min_above_chance`,
    which can be passed by luck if there are few test images."""
    min_against_linear_probe: float | None = None
    """Smallest accuracy of the new task minus that of a linear probe on the same features; -0.05
    allows 5 points less."""
    max_seconds: float | None = None
    """Largest number of wall seconds that the new task takes, all phases together."""
    max_bytes_per_task: int | None = None
    """Largest number of bytes that the new task adds to the checkpoint."""

    def __post_init__(self) -> None:
        for key, low, high in (("max_loss_on_earlier_task", 0, 1), ("min_accuracy_new", 0, 1),
                               ("min_above_chance", 0, 1), ("max_p_value", 0, 1),
                               ("min_against_linear_probe", -1, 1),
                               ("max_seconds", 0, math.inf), ("max_bytes_per_task", 0, math.inf)):
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise InputError(f"policy {key} is {value!r}; allowed: {low} to {high:g}, or null "
                                 "for no limit")


@dataclasses.dataclass(frozen=True)
class GateFacts:
    """The measured facts about a new version; None means not measured."""

    task: str
    """Name of the new or refreshed task."""
    classes: int
    """Number of classes of that task; guessing has an accuracy of 1 / classes."""
    after: Mapping[str, float]
    """Accuracy of the new version on every task's test images."""
    before: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Best earlier accuracy on the same test images; a task without one is new."""
    images: int | None = None
    """Number of test images on which the accuracy of the new or refreshed task was measured."""
    linear_probe: float | None = None
    seconds: float | None = None
    bytes_per_task: int | None = None
    doubts: tuple[str, ...] = ()
    """Sentences that a person must read (`partialhn.evaluation.doubts`); they decide nothing."""

    @staticmethod
    def of_rows(tasks: Sequence[str], rows: Sequence[Sequence[float]], classes: int,
                **measured: Any) -> "GateFacts":
        """The facts about the last of T tasks, from the rows R[i, 0..i] of each experience i.

        `before` is the best of the earlier rows, so that small losses cannot add up unnoticed.
        """
        *earlier, last = [list(row) for row in rows]
        best = {name: max(row[j] for row in earlier[j:]) for j, name in enumerate(tasks[:-1])}
        return GateFacts(tasks[-1], classes, dict(zip(tasks, last, strict=True)), best, **measured)


@dataclasses.dataclass(frozen=True)
class TaskVerdict:
    """One row in the decision's table of tasks."""

    task: str
    before: float | None
    after: float
    loss: float | None
    """before - after; None for a new task."""
    passed: bool


@dataclasses.dataclass(frozen=True)
class Decision:
    """The gate's decision, with every number that it depends on."""

    passed: bool
    task: str
    reasons: tuple[str, ...]
    """The limits that were not kept; empty if the version passed."""
    checks: tuple[str, ...]
    """Every limit of the policy, with the value found."""
    tasks: tuple[TaskVerdict, ...]
    """At most about LISTED of the tasks."""
    policy: Policy
    warnings: tuple[str, ...] = ()
    """Sentences that a person must read whatever was decided."""

    @property
    def suffering(self) -> tuple[TaskVerdict, ...]:
        """The earlier tasks that would lose too much accuracy, the worst first."""
        rows = [row for row in self.tasks if not row.passed and row.loss is not None]
        return tuple(sorted(rows, key=lambda row: -(row.loss or 0)))

    def fields(self) -> dict[str, Any]:
        """The decision as plain values for JSON."""
        return {"passed": self.passed, "task": self.task, "reasons": list(self.reasons),
                "checks": list(self.checks),
                "tasks": [dataclasses.asdict(row) for row in self.tasks],
                "policy": dataclasses.asdict(self.policy), "warnings": list(self.warnings)}

    @staticmethod
    def from_fields(fields: Mapping[str, Any]) -> "Decision":
        """Rebuilds a decision from its `fields`."""
        return Decision(bool(fields["passed"]), str(fields["task"]), tuple(fields["reasons"]),
                        tuple(fields["checks"]),
                        tuple(TaskVerdict(**row) for row in fields["tasks"]),
                        Policy(**fields["policy"]), tuple(fields.get("warnings", ())))


def load_policy(path: str | Path) -> Policy:
    """Reads a policy file: YAML with the keys of `Policy`, all optional.

    Its section `inbox` is ignored here; `pipelines.retrain.validate` uses it. Raises: InputError
    for a missing file, broken YAML, an unknown key or a wrong value.
    """
    values = {key: value for key, value in read_policy(path).items() if key != "inbox"}
    return typing.cast(Policy, build(Policy, values, "policy."))


def read_policy(path: str | Path) -> Mapping[str, Any]:
    """The plain values of a policy file. Raises: InputError if it cannot be read."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"policy file {str(path)!r} cannot be read: {error.strerror}; give the "
                         "path of a YAML file") from error
    values = read_yaml(content, f"policy file {str(path)!r}")
    if not isinstance(values, Mapping):
        keys = ", ".join(field.name for field in dataclasses.fields(Policy))
        raise InputError(f"policy file {str(path)!r} holds {type(values).__name__}; allowed: the "
                         f"keys {keys} and the section inbox")
    return values


def decide(policy: Policy, facts: GateFacts) -> Decision:
    """Compares the facts with the policy; the decision depends on nothing but the arguments.

    Raises: ValueError if the new task has no accuracy.
    """
    if facts.task not in facts.after:
        raise ValueError(f"the new task {facts.task!r} has no accuracy")
    new, chance = facts.after[facts.task], 1 / facts.classes
    limits = [
        _at_least("accuracy", policy.min_accuracy_new, new),
        _at_least(f"accuracy above chance ({chance:.3f})", policy.min_above_chance, new - chance),
        None if policy.min_above_chance is None else _at_most(
            f"p-value of guessing ({facts.images} test images)", policy.max_p_value,
            None if facts.images is None else p_value(new, chance, facts.images)),
        _at_least("accuracy minus linear probe" + ("" if facts.linear_probe is None else
                                                   f" ({facts.linear_probe:.3f})"),
                  policy.min_against_linear_probe,
                  None if facts.linear_probe is None else new - facts.linear_probe),
        _at_most("seconds", policy.max_seconds, facts.seconds),
        _at_most("bytes of the task", policy.max_bytes_per_task, facts.bytes_per_task)]
    checks = [(f"task {facts.task!r}: {text}", holds) for text, holds in filter(None, limits)]
    return _decision(policy, facts, checks)


def decide_without(policy: Policy, forgotten: str, after: Mapping[str, float],
                   before: Mapping[str, float]) -> Decision:
    """Decides on a version that has forgotten a task: no other task may lose too much by it.

    The policy's limits for new tasks do not apply. after, before: accuracy of each other task, and
    its best accuracy so far.
    """
    policy = Policy(policy.max_loss_on_earlier_task, min_above_chance=None, max_p_value=None)
    return _decision(policy, GateFacts(forgotten, 1, after, before), [])


def _decision(policy: Policy, facts: GateFacts, checks: list[tuple[str, bool]]) -> Decision:
    """The decision after `checks` and the losses of earlier tasks."""
    rows = tuple(_row(policy, task, facts.before.get(task), after)
                 for task, after in facts.after.items())
    listed = _listed(rows)
    missing = sorted(set(facts.before) - set(facts.after))
    if policy.max_loss_on_earlier_task is not None:
        checks += [(f"task {row.task!r}: {row.before:.3f} -> {row.after:.3f}, loss "
                    f"{row.loss:.3f}, allowed at most {policy.max_loss_on_earlier_task:g}",
                    row.passed)
                   for row in listed if row.before is not None]
        if len(listed) < len(rows):
            checks.append((f"{len(rows) - len(listed)} more earlier tasks: loss at most "
                           f"{policy.max_loss_on_earlier_task:g}", True))
        checks += [(f"task {task!r}: accuracy was not measured", False) for task in missing]
    reasons = tuple(text for text, holds in checks if not holds)
    return Decision(not reasons, facts.task, reasons, tuple(text for text, _ in checks), listed,
                    policy, facts.doubts)


def _listed(rows: tuple[TaskVerdict, ...]) -> tuple[TaskVerdict, ...]:
    """The rows that a decision keeps: all, or of many tasks the new one, every one that loses too
    much, and those that lost most. Each decision would otherwise be longer than the one before.
    """
    if len(rows) <= LISTED:
        return rows
    worst = sorted((row for row in rows if row.passed and row.loss is not None),
                   key=lambda row: -(row.loss or 0))[:LISTED]
    kept = {row.task for row in worst}
    return tuple(row for row in rows
                 if row.loss is None or not row.passed or row.task in kept)


def p_value(accuracy: float, chance: float, images: int) -> float:
    """The probability that guessing gets as many images right; NaN for an accuracy of NaN."""
    if not math.isfinite(accuracy):
        return math.nan
    right = round(accuracy * images)
    if right <= 0 or chance >= 1:
        return 1.0
    # the terms of the binomial distribution from `right` on, each from the one before
    first = (math.lgamma(images + 1) - math.lgamma(right + 1) - math.lgamma(images - right + 1)
             + right * math.log(chance) + (images - right) * math.log1p(-chance))
    count = np.arange(right, images)
    ratios = np.log((images - count) / (count + 1)) + math.log(chance) - math.log1p(-chance)
    return min(1.0, float(np.exp(first + np.concatenate([[0.0], np.cumsum(ratios)])).sum()))


def _row(policy: Policy, task: str, before: float | None, after: float) -> TaskVerdict:
    loss = None if before is None else before - after
    limit = policy.max_loss_on_earlier_task
    passed = loss is None or limit is None or loss <= limit + TOLERANCE  # NaN does not pass
    return TaskVerdict(task, before, after, loss, passed)


def _at_least(what: str, limit: float | None, value: float | None) -> tuple[str, bool] | None:
    if limit is None:
        return None
    if value is None:
        return f"{what} was not measured, wanted at least {limit:g}", False
    return f"{what} {value:.3f}, wanted at least {limit:g}", value >= limit - TOLERANCE


def _at_most(what: str, limit: float | None, value: float | None) -> tuple[str, bool] | None:
    if limit is None:
        return None
    if value is None:
        return f"{what} were not measured, allowed at most {limit:g}", False
    return f"{what} {value:g}, allowed at most {limit:g}", value <= limit
