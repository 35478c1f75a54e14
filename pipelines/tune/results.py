"""The results of a search: records of trials are logged, sent to MLflow and turned into advice."""

import concurrent.futures
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.numbers import duration, percent
from pipelines.advice.decide import DepthResult, choose, results_by_depth
from pipelines.advice.facts import advice_fields, costs
from pipelines.advice.page import render
from pipelines.search.depths import Depths
from pipelines.search.sampling import Goal
from pipelines.search.space import Space
from pipelines.search.state import Measured, SearchState, TrialPlan, TrialRecord
from pipelines.tune.runs import SearchRuns

Log = Callable[[str], None]
FIRST_WORDS = "# Best trial of depth"
"""The beginning of a depth's configuration file."""


class Results:
    """All records of a search, from this session and from earlier ones."""

    def __init__(self, state: SearchState, settings: Mapping[str, Any], space: Space,
                 registry: SearchRuns, survey: Mapping[str, Any], log: Log) -> None:
        self._state, self._settings, self._space = state, settings, space
        self._registry, self._survey, self._log = registry, survey, log
        self._start = time.monotonic()
        self.records = state.records()
        self._earlier = max((each.search_seconds for each in self.records), default=0.0)
        saved = settings["options"]
        self._goal = Goal(saved["algorithm"], saved["sampler_seed"], saved["objective"],
                          saved["max_loss"])
        self._parent = registry.search_run(state.name, {
            "objective": saved["objective"], "max_loss": saved["max_loss"],
            "algorithm": saved["algorithm"], "sampler_seed": saved["sampler_seed"],
            "early_stopping": saved["early_stopping"], "space": settings["space"]}
            | settings["config"])
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._sending: list[concurrent.futures.Future[None]] = []
        if self.records:
            log(f"{len(self.records)} trials of earlier sessions are kept")

    def seconds(self) -> float:
        """Time spent on trials, over all sessions that ended a trial."""
        return self._earlier + time.monotonic() - self._start

    def add(self, record: TrialRecord) -> None:
        """Adds a trial that ended: logs it, and sends it to MLflow while the next trial runs."""
        self.records.append(record)
        self._log(self._line(record))
        self._sending.append(self._pool.submit(self._send, record))

    def by_depth(self) -> list[DepthResult]:
        """The best finished trial of each depth with its final runs."""
        return results_by_depth(self.records, self._goal.score)

    def best_depth(self) -> int | None:
        """The depth that the objective prefers so far, by the best trial of each depth alone."""
        results = self.by_depth()
        if not results:
            return None
        return choose({each.depth: _accuracy(each.best) for each in results},
                      costs(self._settings, results), self._goal.objective, self._goal.max_loss)

    def final_plans(self, seeds: int) -> list[TrialPlan]:
        """Final runs: the best trial of each depth, and separate heads, under other seeds."""
        plans = []
        for each in self.by_depth():
            for index in range(1, seeds + 1):
                for kind in ("final", "bound"):
                    strategy = "partial_hn" if kind == "final" else "separate_heads"
                    train = each.best.plan.config["train"]
                    train = train | {"seed": each.best.plan.seed + index, "strategy": strategy}
                    plans.append(TrialPlan(f"{kind}-{each.best.plan.id}-s{index}", kind,
                                           each.best.plan.config | {"train": train},
                                           each.best.plan.params))
        return plans

    def final_seconds(self, seeds: int) -> float:
        """Expected seconds of the remaining final runs, one after the other."""
        done = {record.plan.id for record in self.records}
        seconds = {each.best.plan.id: _measured(each.best).train_seconds
                   + _measured(each.best).evaluate_seconds for each in self.by_depth()}
        return sum(seconds[plan.id.split("-")[1]] for plan in self.final_plans(seeds)
                   if plan.id not in done)

    def publish(self, output: str) -> dict[str, Any]:
        """Writes the advice to a folder and to MLflow, where every trial gets its run."""
        results = self.by_depth()
        if not results:
            raise InputError(f"no trial of search {self._state.name!r} finished; the first of "
                             f"{len(self.records)} failed with: {self.records[0].reason}; allowed: "
                             "a space with valid configurations")
        advice = advice_fields(self._settings, self._space, self.records, results, self._goal,
                               self._survey, self.seconds())
        folder = output_folder(output)
        files = {f"depth-{each.depth}.yaml": _config_file(each) for each in results}
        files |= {"advice.json": json.dumps(advice, indent=1), "advice.html": render(advice)}
        write_advice(folder, files)
        self._finish_registry(advice, [folder / name for name in files])
        return advice

    def _line(self, record: TrialRecord) -> str:
        plan, measured = record.plan, record.measured
        what = {"search": "trial", "final": "final run", "bound": "separate heads"}[plan.kind]
        text = f"{what} {plan.id}  depth {plan.depth}  "
        if record.status == "failed":
            return f"{text}failed: {record.reason}"
        assert measured is not None
        text += (f"accuracy {percent(measured.accuracy)} after {len(measured.rows)} tasks  "
                 f"{duration(measured.seconds)}")
        if record.status == "pruned":
            return f"{text}  stopped early"
        best = max((each for each in self.records if each.finished
                    and each.plan.kind == "search"), key=_accuracy)
        return (f"{text}  (best trial {percent(_accuracy(best))} at depth {best.plan.depth}; "
                f"{len(self.records)} done in {duration(self.seconds())})")

    # MLflow ----------------------------------------------------------------------------------

    def _send(self, record: TrialRecord) -> None:
        self._registry.log_trial(self._parent, record.plan.id, record.status, record.plan.config,
                                 _metrics(record), {"trial_kind": record.plan.kind,
                                                    "reason": record.reason})

    def _finish_registry(self, advice: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Makes sure that every record has its run, also after failed attempts."""
        self._pool.shutdown()
        for sent in self._sending:
            if (error := sent.exception()) is not None:
                self._log(f"note: MLflow did not take a trial ({error}); sending it again")
        complete = self._registry.trials_of(self._parent)
        for record in self.records:
            if record.plan.id not in complete:
                self._send(record)
        for path in files:
            self._registry.log_file(self._parent, path)
        chosen = advice["recommendation"]
        self._registry.log_metrics(self._parent, {
            "recommended_depth": chosen["depth"], "accuracy": chosen["accuracy"]["mean"],
            "trials": len(self.records)})
        self._registry.end_run(self._parent)


def output_folder(output: str) -> Path:
    """The folder of the advice, made if need be. Raises: InputError if it cannot be written to."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file is there" if folder.is_file() else error.strerror
        raise InputError(f"output is {output!r}, which cannot be made ({why}); allowed: a folder "
                         "that you may write to") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"output is {output!r}, which cannot be written to; allowed: a folder "
                         "that you may write to")
    return folder


def write_advice(folder: Path, files: Mapping[str, str]) -> None:
    """Writes the files of an advice, and deletes the configurations of an earlier one's depths."""
    for old in folder.glob("depth-*.yaml"):
        if old.name not in files and old.read_text(encoding="utf-8").startswith(FIRST_WORDS):
            old.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def log_forecast(log: Log, forecast: Sequence[Mapping[str, Any]], depths: Depths) -> None:
    """Logs the forecast, one line for each depth."""
    log(f"forecast from the first two tasks (linear probe on each {depths.unit}'s features):")
    for stage in forecast:
        mark = "worth trying" if stage["worth_trying"] else "doubtful"
        log(f"  depth {stage['depth']} (freezing {depths.freezing(stage['depth'])}): first task "
            f"{percent(stage['probe_first'])}, second {percent(stage['probe_second'])}; "
            f"{_remains(stage['kept'])}: {mark}")


def _remains(kept: float | None) -> str:
    return ("the probe only guesses, which says nothing" if kept is None else
            f"{percent(kept)} of the accuracy above chance remains")


def _config_file(result: DepthResult) -> str:
    """A depth's best configuration, for `partialhn train --config`."""
    config = Config.from_dict(result.best.plan.config)
    return (f"{FIRST_WORDS} {result.depth}: {result.best.plan.id}\n"
            + yaml.safe_dump(config.to_dict(), sort_keys=False))


def _metrics(record: TrialRecord) -> list[tuple[str, float, int]]:
    """Name, value and step: accuracy after each task, each task's own, and costs."""
    measured = record.measured
    if measured is None:
        return []
    points = [("accuracy", sum(row) / len(row), index) for index, row in enumerate(measured.rows)]
    points += [("task_accuracy", value, index) for index, value in enumerate(measured.rows[-1])]
    points += [("test_task_accuracy", value, index)
               for index, value in enumerate(measured.test_row or ())]
    if measured.test_accuracy is not None:
        points.append(("test_accuracy", measured.test_accuracy, 0))
    costs = ("train_seconds", "processor_seconds", "evaluate_seconds", "feature_bytes",
             "serving_macs", "head_bytes", "checkpoint_bytes", "bytes_per_task", "epochs")
    points += [(name, float(getattr(measured, name)), 0) for name in costs]
    return [*points, ("search_seconds", record.search_seconds, 0)]


def _measured(record: TrialRecord) -> Measured:
    assert record.measured is not None
    return record.measured


def _accuracy(record: TrialRecord) -> float:
    return _measured(record).accuracy


