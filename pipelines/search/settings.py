"""The options of `partialhn tune`: budget, objective, prices, and the place of its results.

The stream itself is `partialhn.config.Config`. Nothing heavy is imported, so that `--help`
answers at once. An option that is left out (None) takes its default in a new search, and what the
search was started with when it is resumed.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from partialhn.errors import InputError
from pipelines.settings import check_name

Objective = Literal["accuracy", "cost", "balanced"]
Algorithm = Literal["tpe", "multi", "random"]

DEFAULTS: dict[str, Any] = {
    "budget": "30min", "objective": "balanced", "max_loss": 0.01, "algorithm": "tpe",
    "sampler_seed": 0, "early_stopping": "asha", "seeds": 3}
"""Defaults of the options that a resumed search remembers."""
_BUDGET = re.compile(r"(?P<count>\d+(?:\.\d+)?) ?(?P<unit>s|min|h)|(?P<trials>\d+)-trials?")
_SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """The objective and budget of a search, and the place of its results."""

    name: str = "search"
    """Name of a new search: letters, digits, _ and - only. The same name and options go on where
    an earlier search stopped."""
    resume: str | None = None
    """Go on with the search of this name, with its stream, space and options; those given here
    (budget, objective, max loss, seeds, prices, compute, and the place of the same images) win.
    Others that are given must be as they were."""
    budget: str | None = None
    """Time for trials (90s, 30min, 2h), final runs included, or a number of trials (200-trials);
    default: 30min."""
    objective: Objective | None = None
    """accuracy: the most accurate depth. cost: the cheapest within max-loss of it. balanced
    (default): each doubling of the cost must gain max-loss of accuracy. With accuracy and balanced,
    of depths that the seeds cannot tell apart, the cheapest."""
    unknown_task: bool = False
    """Judge trials by class-incremental accuracy: answers over the classes of all tasks, where
    nobody says the task. A resumed search goes on as it was started."""
    max_loss: float | None = None
    """Accuracy that may be given up for cost, 0 to 1; default: 0.01, one point."""
    depths: tuple[int | str, ...] | None = None
    """Freeze depths to compare: numbers, names of blocks, or shares such as 75%; default: all, from
    0 (nothing frozen) to all but the classifier; in a network with more than 5 depths first some,
    then those around the best."""
    space: str | None = None
    """YAML file with more to search, or other ranges: hypernet.beta: {loguniform: [0.001, 1]}."""
    algorithm: Algorithm | None = None
    """How trials are chosen: tpe (default; Optuna), multi (TPE over accuracy, seconds and feature
    bytes at once) or random."""
    sampler_seed: int | None = None
    """Seed of the choice of trials; default: 0."""
    early_stopping: Literal["asha", "none"] | None = None
    """asha (default): a trial stops when it is clearly worse than others of its depth after as
    many tasks. none: every trial learns all tasks."""
    seeds: int | None = None
    """Training seeds that the best trial of each depth is run again with, 1 to 20; default: 3."""
    trials_at_once: int | None = None
    """Most trials that run at the same time; default: as many as the cluster has room for, and on
    one machine with a GPU 8, which share a process."""
    cpus_per_trial: float = 1.0
    """CPUs of a trial, also its threads."""
    gpus_per_trial: float | None = None
    """Share of a GPU of a trial, and of its memory, 0 to 1; the trial then has a process of its
    own. Default: 0.25 on several machines with a GPU; on one, trials share a process."""
    forecast_only: bool = False
    """Only forecast from the first two tasks which depths are worth trying; no trial runs."""
    price_gpu_hour: float | None = None
    """Price of an hour of the machine that trains; with price-gib-month it gives a table of
    costs, in the same currency."""
    price_gib_month: float | None = None
    """Price of storing a GiB for a month."""
    tasks_a_month: float | None = None
    """New tasks a month for the table of costs; default: 1."""
    output: str = "advice"
    """Folder for advice.json, advice.html, and a configuration for each depth."""
    storage: str = "partialhn-store"
    """Folder or s3://bucket/prefix, as for train: features are shared with it."""
    tracking_uri: str | None = None
    """MLflow tracking server or database, as for train."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.resume is not None:
            check_name(self.resume)
        if self.budget is not None:
            parse_budget(self.budget)
        for key in ("storage", "output"):
            _require(bool(getattr(self, key)), key, "", "a path")
        self._numbers()

    def _numbers(self) -> None:
        for key, low, high in (("max_loss", 0, 1), ("seeds", 1, 20), ("sampler_seed", 0, 2**31),
                               ("trials_at_once", 1, 10_000), ("price_gpu_hour", 0, 1e9),
                               ("price_gib_month", 0, 1e9), ("tasks_a_month", 0.01, 1e6)):
            value = getattr(self, key)
            _require(value is None or low <= value <= high, key, value, f"{low:g} to {high:g}")
        _require(self.cpus_per_trial > 0, "cpus_per_trial", self.cpus_per_trial, "more than 0")
        _require(self.gpus_per_trial is None or 0 <= self.gpus_per_trial <= 1, "gpus_per_trial",
                 self.gpus_per_trial, "0 to 1, since a trial learns in one process on one GPU")
        _require(self.depths is None or len(set(self.depths)) == len(self.depths) > 0, "depths",
                 self.depths, "different depths")
        _require((self.price_gpu_hour is None) == (self.price_gib_month is None),
                 "price_gpu_hour and price_gib_month", (self.price_gpu_hour, self.price_gib_month),
                 "both, or neither")

    def remembered(self) -> dict[str, Any]:
        """The options that belong to the search, with their defaults."""
        return {key: default if getattr(self, key) is None else getattr(self, key)
                for key, default in DEFAULTS.items()} | self.prices() | {
                    "unknown_task": self.unknown_task}

    def prices(self) -> dict[str, Any]:
        """The options for the table of costs."""
        return {"price_gpu_hour": self.price_gpu_hour, "price_gib_month": self.price_gib_month,
                "tasks_a_month": self.tasks_a_month}

    def changed(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """A resumed search's options: those given here where they may change, otherwise as saved.

        Raises: InputError for an option that would make another search of it.
        """
        for key in ("algorithm", "sampler_seed", "early_stopping"):
            given = getattr(self, key)
            _require(given is None or given == saved[key], key, given,
                     f"{saved[key]!r}, as the search was started with; or another --name")
        began_with = saved.get("unknown_task", False)  # searches of version 0.1.0 lack it
        _require(not self.unknown_task or began_with, "unknown_task", self.unknown_task,
                 "False, as the search was started with; or another --name")
        given = {key: getattr(self, key) for key in saved if getattr(self, key) is not None}
        return dict(saved) | given | {"unknown_task": began_with}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Either a time or a number of trials."""

    seconds: float | None = None
    trials: int | None = None


def parse_budget(text: str) -> Budget:
    """30min, 2h, 90s or 200-trials. Raises: InputError."""
    match = _BUDGET.fullmatch(text.strip())
    budget = Budget()
    if match and match["trials"]:
        budget = Budget(trials=int(match["trials"]))
    elif match:
        budget = Budget(seconds=float(match["count"]) * _SECONDS[match["unit"]])
    _require(bool(budget.seconds or budget.trials), "budget", text,
             "a time such as 90s, 30min or 2h, or a number of trials such as 200-trials")
    return budget


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"{key} is {value!r}; allowed: {allowed}")
