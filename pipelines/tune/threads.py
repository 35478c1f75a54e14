"""Trials that share this process, each in a thread and, on a GPU, on a stream of its own.

Processes take turns on a GPU, and streams of one process overlap (`partialhn.training.together`).
So where the GPU is this machine's, trials run here and not in Ray Tune's actors. The trials, the
search algorithm, the rule that stops trials early and the records are the same.
"""

import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from partialhn.networks.device_memory import DeviceMemoryError
from partialhn.training.together import Lanes
from pipelines.search.sampling import TrialSource
from pipelines.search.trial import Bench, trial_results


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A trial, with the attributes that a scheduler reads."""

    trial_id: str
    config: dict[str, Any]


class TrialThreads:
    """Runs the trials of a source in threads."""

    def __init__(self, source: TrialSource, scheduler: Any, bench: Bench, count: int,
                 log: Callable[[str], None]) -> None:
        """scheduler: one of Ray Tune's, asked after each task, or None. count: trials at once."""
        self._source, self._bench, self._count, self._log = source, bench, count, log
        self._scheduler: Any = FIFOScheduler() if scheduler is None else scheduler
        """Any, since it gets trials of ours and no controller."""
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._again: collections.deque[_Trial] = collections.deque()
        """Trials that found no memory beside others."""

    def run(self) -> None:
        """Returns when the source has no more trials and all have ended."""
        bench = dataclasses.replace(self._bench, in_threads=True)
        with Lanes(self._count, bench.device.here()) as lanes:
            for _ in range(self._count):
                lanes.start(lambda: self._work_off(bench, lanes.go_on))
            lanes.wait()
        if self._source.error:
            raise self._source.error

    def _work_off(self, bench: Bench, go_on: Callable[[], None]) -> None:
        """Runs one trial after the other in this thread, until there are none."""
        while True:
            with self._lock:
                trial, alone = self._next(), self._count == 1
                if trial is None:
                    self._count -= 1
                    return
            try:
                result = self._run(trial, bench, alone, go_on)
            except DeviceMemoryError:
                with self._lock:
                    self._again.append(trial)
                    if self._count > 1:
                        self._count -= 1
                        self._log(f"the GPU has too little memory; {self._count} trials go on")
                        return
                continue
            with self._lock:
                self._source.on_trial_complete(trial.trial_id, result)

    def _next(self) -> _Trial | None:
        if self._again:
            return self._again.popleft()
        trial_id = f"{next(self._numbers):05d}"
        choice = self._source.suggest(trial_id)
        if choice == Searcher.FINISHED:
            return None
        trial = _Trial(trial_id, choice)
        self._scheduler.on_trial_add(None, trial)
        return trial

    def _run(self, trial: _Trial, bench: Bench, alone: bool,
             go_on: Callable[[], None]) -> dict[str, Any] | None:
        """The last result of a trial, which may be stopped before its end."""
        result: dict[str, Any] | None = None
        for result in trial_results(trial.config, bench, explain_memory=alone, go_on=go_on):
            with self._lock:
                decision = self._scheduler.on_trial_result(None, trial, result)
            if decision == TrialScheduler.STOP:
                return result
        if result is not None:
            with self._lock:
                self._scheduler.on_trial_complete(None, trial, result)
        return result
