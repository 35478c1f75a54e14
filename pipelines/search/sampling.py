"""The choice of the next trial: a search algorithm for Ray Tune over Optuna and stored records.

Optuna chooses the values of a trial. Ray Tune's own `OptunaSearch` is not used, because it tells
Optuna the last score of a stopped trial as if it had learned every task, and because it keeps its
state in a pickle. Here every trial that ended is a JSON record (`state`); a resumed search
adds all of them to a fresh study, and the sampler's seed depends on the trial's number, so trial
17 of a random search is the same trial however often the search was killed.
"""

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from ray.tune.search import Searcher

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.run import check
from pipelines.search.rounds import Rounds
from pipelines.search.settings import Algorithm, Objective
from pipelines.search.space import DECIDING, Choice, Range, Space, applies, value_of
from pipelines.search.state import Measured, SearchState, TrialPlan, TrialRecord, parse_measured

ATTEMPTS = 100
"""Draws of invalid combinations of values before the space is refused."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """The objective of the sampler."""

    algorithm: Algorithm
    seed: int
    objective: Objective
    max_loss: float

    def score(self, measured: Measured) -> float:
        """One number, larger is better: accuracy, less max_loss for each doubling of the cost."""
        if self.objective == "accuracy":
            return measured.accuracy
        return measured.accuracy - self.max_loss * math.log2(max(measured.seconds, 1e-3))


class Proposals:
    """Proposes trials, learning from every trial that ended."""

    def __init__(self, space: Space, base: Config, goal: Goal,
                 records: Iterable[TrialRecord], rounds: Rounds | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._base, self._goal = space, base, goal
        self._dimensions = {key: _distribution(each) for key, each in space.dimensions.items()}
        self._rounds = rounds or Rounds(space)
        self._several = goal.algorithm == "multi"
        self.study = optuna.create_study(directions=["maximize", "minimize", "minimize"]
                                         if self._several else ["maximize"])
        for record in records:
            self.learn(record)

    def learn(self, record: TrialRecord) -> None:
        """Adds a trial that ended to the study."""
        if record.plan.kind != "search":
            return
        params = {key: _encode(self._space, key, value) for key, value
                  in record.plan.params.items() if key in self._dimensions}
        common: dict[str, Any] = {
            "params": params, "user_attrs": {"trial": record.plan.id},
            "distributions": {key: self._dimensions[key] for key in params}}
        measured = record.measured
        if record.finished and measured:
            values = ([measured.accuracy, measured.seconds, measured.feature_bytes]
                      if self._several else [self._goal.score(measured)])
            ended = optuna.trial.create_trial(values=values, **common)
        elif measured and not self._several and record.status == "pruned":
            steps = {index + 1: sum(row) / len(row) for index, row in enumerate(measured.rows)}
            ended = optuna.trial.create_trial(state=TrialState.PRUNED, intermediate_values=steps,
                                              **common)
        else:  # Optuna has no pruned trials with several objectives
            ended = optuna.trial.create_trial(state=TrialState.FAIL, **common)
        self.study.add_trial(ended)

    def propose(self, number: int) -> TrialPlan:
        """The trial with this number, at the grid point that the rounds give it.

        The first trial of each grid point is the user's configuration.

        Raises: InputError when no draw gave a valid configuration.
        """
        point, first = self._rounds.point(number)
        wanted = self._usual() | point if first else point
        problem: InputError | None = None
        for attempt in range(ATTEMPTS):
            params = self._ask(f"{self._goal.seed}/{number}/{attempt}", wanted)
            try:
                config = self._space.config(self._base, params)
                check(config)
            except InputError as error:
                problem = error
                wanted = point
                continue
            return TrialPlan(f"{number:04d}", "search", config.to_dict(), params)
        raise InputError(f"{ATTEMPTS} draws from the space gave no configuration that works; the "
                         f"last: {problem}")

    def _usual(self) -> dict[str, Any]:
        """The values of the user's own configuration that lie in the space."""
        usual = {key: value_of(self._base, key) for key in self._dimensions}
        return {key: value for key, value in usual.items() if self._holds(key, value)}

    def _holds(self, key: str, value: Any) -> bool:
        each = self._space.dimensions[key]
        return value in each.values if isinstance(each, Choice) else each.low <= value <= each.high

    def _ask(self, seed: str, wanted: dict[str, Any]) -> dict[str, Any]:
        """One draw; `wanted` fixes the values of some keys."""
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4])
        self.study.sampler = _sampler(self._goal.algorithm, number)
        self.study.enqueue_trial({key: _encode(self._space, key, value)
                                  for key, value in wanted.items()})
        with warnings.catch_warnings():  # a draw from a space whose keys depend on each other
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.study.ask()
            params: dict[str, Any] = {}
            for key in sorted(self._dimensions, key=lambda key: key not in DECIDING):
                if applies(key, self._space.fixed | params, self._base):
                    params[key] = self._suggest(trial, key)
        self.study.tell(trial, state=TrialState.FAIL)  # the result is added by `learn`
        return params

    def _suggest(self, trial: optuna.Trial, key: str) -> Any:
        kind = self._dimensions[key]
        if isinstance(kind, CategoricalDistribution):
            drawn = trial.suggest_categorical(key, kind.choices)
            each = self._space.dimensions[key]
            assert isinstance(each, Choice)
            return each.values[kind.choices.index(drawn)]
        if isinstance(kind, IntDistribution):
            return trial.suggest_int(key, kind.low, kind.high, log=kind.log)
        assert isinstance(kind, FloatDistribution)
        return trial.suggest_float(key, kind.low, kind.high, log=kind.log)


def _distribution(each: Choice | Range) -> BaseDistribution:
    if isinstance(each, Choice):
        return CategoricalDistribution([json.dumps(value) for value in each.values])
    if each.whole:
        return IntDistribution(int(each.low), int(each.high), log=each.log)
    return FloatDistribution(each.low, each.high, log=each.log)


def _encode(space: Space, key: str, value: Any) -> Any:
    """A value as the study stores it: choices as JSON, since Optuna takes no lists."""
    return json.dumps(value) if isinstance(space.dimensions[key], Choice) else value


def _sampler(algorithm: Algorithm, seed: int) -> optuna.samplers.BaseSampler:
    if algorithm == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # given, because their defaults are not the same in Optuna 4 and 5
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=10, multivariate=True,
                                          constant_liar=True)


class TrialSource(Searcher):
    """Hands trials to Ray Tune and keeps a record of each that ends.

    The `planned` trials come first, then those that `more` returns until it returns None. `ended`
    is called with every record. An exception is kept in `error` for the driver to raise, since Ray
    Tune would log it and go on.
    """

    def __init__(self, state: SearchState, planned: Sequence[TrialPlan],
                 more: Callable[[], TrialPlan | None], ended: Callable[[TrialRecord], None],
                 seconds: Callable[[], float]) -> None:
        super().__init__(metric="accuracy", mode="max")
        self._state, self._planned, self._more = state, list(planned), more
        self._ended, self._seconds = ended, seconds
        self._running: dict[str, TrialPlan] = {}
        self.error: Exception | None = None

    def suggest(self, trial_id: str) -> Any:
        """The next trial's configuration for Ray Tune, or FINISHED."""
        if self.error:
            return Searcher.FINISHED
        try:
            plan = self._planned.pop(0) if self._planned else self._more()
            if plan is None:
                return Searcher.FINISHED
            self._state.start(plan)
        except Exception as error:  # raised by the driver
            self.error = error
            return Searcher.FINISHED
        self._running[trial_id] = plan
        return {"plan": dataclasses.asdict(plan)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None,
                          error: bool = False) -> None:
        """Keeps the record of a trial that finished, was stopped, or failed."""
        plan = self._running.pop(trial_id, None)
        if plan is None:
            return
        try:
            record = _record(plan, result, error, self._seconds())
            if record:
                self._ended(self._state.finish(record))
        except Exception as problem:  # raised by the driver
            self.error = problem

    def __getstate__(self) -> dict[str, Any]:
        """No state: Ray Tune pickles its search algorithm into its scratch folder."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Saves nothing: the search has its own records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is ever read back from Ray Tune's files."""
        raise NotImplementedError("a search goes on from its records: partialhn tune --resume")


def _record(plan: TrialPlan, result: dict[str, Any] | None, error: bool,
            seconds: float) -> TrialRecord | None:
    """The record of a trial; None when the search was interrupted before its first report."""
    text = (result or {}).get("measured")
    measured = parse_measured(json.loads(text)) if text else None
    if error:
        return TrialRecord(plan, "failed", "its process died again and again (out of memory?)",
                           measured, seconds)
    if result is None or "failed" not in result:
        return None
    if result["failed"]:
        return TrialRecord(plan, "failed", result["failed"], measured, seconds)
    if measured and len(measured.rows) < len(measured.tasks):
        return TrialRecord(plan, "pruned", f"worse than others of depth {plan.depth} after "
                           f"{len(measured.rows)} of {len(measured.tasks)} tasks", measured,
                           seconds)
    return TrialRecord(plan, "finished", "", measured, seconds)
