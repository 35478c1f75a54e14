"""Early stopping: Ray Tune's ASHA, one scheduler for each freeze depth."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.search.state import TrialRecord

GRACE_TASKS = 2
"""Tasks that a trial learns before it may stop: the trunk was trained on the first one."""
REDUCTION = 2
UNDISTURBED = 3
"""The first trials of a depth are never stopped: to be worse than one other trial says little."""


@dataclasses.dataclass(frozen=True)
class _Past:
    """A trial of an earlier session, with the attributes that ASHA reads."""

    trial_id: str


class AshaByDepth(FIFOScheduler):
    """ASHA over tasks, one for each depth.

    A trial competes with trials of its own depth only. In competition with all depths every deep
    trial would stop early, and the advice could not compare the depths.
    """

    def __init__(self, tasks: int, records: Iterable[TrialRecord]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tasks = tasks
        self._of: dict[int, Any] = {}
        """The ASHA scheduler of each depth; Any, since past trials have no controller to pass."""
        self._seen: dict[int, set[str]] = collections.defaultdict(set)
        for record in records:
            if record.plan.kind != "search" or record.measured is None:
                continue
            asha, past = self._at(record.plan.depth), _Past(record.plan.id)
            asha.on_trial_add(None, past)
            self._seen[record.plan.depth].add(past.trial_id)
            for index, row in enumerate(record.measured.rows[:tasks - 1]):
                asha.on_trial_result(None, past, {"tasks_done": index + 1,
                                                  "accuracy": sum(row) / len(row)})

    def _at(self, depth: int) -> Any:
        if depth not in self._of:
            self._of[depth] = ASHAScheduler(
                "tasks_done", "accuracy", "max", max_t=self._tasks,
                grace_period=min(GRACE_TASKS, self._tasks), reduction_factor=REDUCTION)
        return self._of[depth]

    def _for(self, trial: Any) -> Any:
        return self._at(_depth_of(trial))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._for(trial).on_trial_add(tune_controller, trial)
        self._seen[_depth_of(trial)].add(trial.config["plan"]["id"])

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(self._for(trial).on_trial_result(tune_controller, trial, result))
        few = len(self._seen[_depth_of(trial)]) <= UNDISTURBED
        return (TrialScheduler.CONTINUE if few and result["tasks_done"] < self._tasks
                else decision)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._for(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._for(trial).on_trial_remove(tune_controller, trial)


def _depth_of(trial: Any) -> int:
    return int(trial.config["plan"]["config"]["backbone"]["freeze_depth"])
