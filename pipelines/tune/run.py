"""The search over freeze depths: from a stream to a recommended depth with its reasons.

    trunk -> features of every depth -> forecast -> trials (Ray Tune), in rounds where depths around
    the best are added -> final runs: the best trial of each depth, and separate heads, under other
    seeds -> advice (JSON, HTML) and MLflow

Every step uses the results of earlier sessions (`pipelines.search.state`). Ray Tune's own files are
temporary, and nothing reads them.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.errors import InputError
from partialhn.run import with_depth_number
from pipelines.execution.on_ray import RayExecution
from pipelines.execution.open_data import open_data
from pipelines.features.in_use import InUse
from pipelines.features.on_ray import decoding_actors, on_ray
from pipelines.platform.cluster import WorkerDevice, cluster_nodes, start_ray
from pipelines.platform.packing import Packing, Room, pack
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage, open_storage
from pipelines.search.checks import (
    check_same_space,
    check_search,
    check_stream,
    resumed,
    settled,
    sole_session,
)
from pipelines.search.depths import find_depths
from pipelines.search.rounds import add_round, load_rounds
from pipelines.search.sampling import Goal, Proposals, TrialSource
from pipelines.search.settings import Budget, SearchConfig, parse_budget
from pipelines.search.space import Space, load_space, parse_space
from pipelines.search.state import FORMAT, SearchState, TrialPlan, TrialRecord
from pipelines.search.stopping import AshaByDepth
from pipelines.search.survey import (
    Computing,
    depth_features,
    depths_at_once,
    forecast_depths,
    ridge_accuracies,
    task_shifts,
    whole_network_seconds,
)
from pipelines.search.trial import Bench, run_trial
from pipelines.tune.results import Results, log_forecast, output_folder
from pipelines.tune.runs import connect_search
from pipelines.tune.threads import TrialThreads

Log = Callable[[str], None]
MAX_FAILURES = 3
TRIAL_MEMORY = 600 << 20
"""Bytes of a trial's process beside the features it holds."""
GPU_SHARE = 0.25
FINAL_SHARE = 0.4
"""At most this part of a time budget is kept for the final runs."""


def tune(config: Config, options: SearchConfig, log: Log = print) -> dict[str, Any]:
    """Searches, and writes the advice; returns what `advice.json` holds (or the forecast alone).

    Raises: InputError for anything the user can set right.
    """
    storage = open_storage(options.storage)
    storage.check()
    with storage.explained():
        return _tune(config, options, storage, log)


def _tune(config: Config, options: SearchConfig, storage: Storage, log: Log) -> dict[str, Any]:
    state = SearchState(storage, options.resume or options.name)
    saved = state.settings()
    if options.resume and saved is None:
        raise InputError(f"no search {options.resume!r} at {storage.uri}; allowed: the name of a "
                         "search that was started there")
    if options.resume and saved:
        config = resumed(Config.from_dict(saved["config"]), with_depth_number(config))
        space = parse_space(saved["space"], config)
        check_same_space(space, config, options)
    else:
        config = with_depth_number(config)
        if saved and Config.from_dict(saved["config"]) == config.with_first_values():
            config = config.with_first_values()  # begun with the defaults of 0.1.0
        space = load_space(options.space, config, options.depths)
    remembered = options.changed(saved["options"]) if saved else options.remembered()
    check_search(config, space, remembered["budget"])
    if not options.forecast_only:
        output_folder(options.output)  # now, and not after the last trial
    experiences = open_data(config.data, storage)
    check_stream(experiences)
    settings = {
        "format": FORMAT, "name": state.name, "config": config.to_dict(),
        "space": space.to_dict(), "options": options.remembered(),
        "tasks": [{"name": each.name, "classes": list(each.classes),
                   "fingerprint": each.fingerprint, "train_images": len(each.train)}
                  for each in experiences]}
    if not options.forecast_only:
        settings = json.loads(json.dumps(settings))  # lists for tuples, as in the file
        settings = settled(state.create(settings), settings, options)
    alone = contextlib.nullcontext() if options.forecast_only else sole_session(storage, state.name)
    with alone, InUse(storage, f"search {state.name}") as in_use:
        return _Search(config, space, options, storage, state, settings, experiences, log,
                       in_use).run()


@dataclasses.dataclass
class _Search:
    """One session of a search, step by step."""

    config: Config
    space: Space
    options: SearchConfig
    storage: Storage
    state: SearchState
    settings: dict[str, Any]
    experiences: list[Experience]
    log: Log
    in_use: InUse

    def run(self) -> dict[str, Any]:
        self.depths = find_depths(self.config)
        self.rounds = load_rounds(self.state, self.space)
        names = ", ".join(map(str, self.rounds.depths))
        more = ", then depths around the best of them" if self.space.refines else ""
        self.log(f"{self.state.name}: {len(self.experiences)} tasks, freeze depths {names}{more}")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            connecting = pool.submit(connect_search, self.storage, self.options.tracking_uri)
            start_ray(self.config.compute.ray_address)
            registry = connecting.result()
        self._resources()
        execution = RayExecution(self.config, self.storage, self.state.name,
                                 Progress(self.config, self.log))
        self.trunk_device = execution.device
        self.network = execution.network(self.experiences[0])
        self.together: Sequence[int] = self.rounds.depths
        if self.space.refines and not self.options.forecast_only:
            self.together = depths_at_once(self.network, self._most_views(), self.experiences,
                                           self.rounds.depths, self.space.possible_depths())
        trained_here = self.config.backbone.trunk == "train"
        forecast = self._remote(forecast_depths, self._bench(self.experiences[:2]), trained_here)
        log_forecast(self.log, forecast, self.depths)
        if self.options.forecast_only:
            return {"forecast": forecast}
        self.bench = self._bench(self.experiences)
        survey = {"forecast": forecast, "shifts": self.state.keep(
            "shifts", lambda: self._remote(task_shifts, self.bench)),
            "whole_network": self.state.keep("whole_network", lambda: self._remote(
                whole_network_seconds, self.config, self.experiences[0], self.bench.device,
                self.threads)),
            "ridge": self._ridge(), "held_out_images": self._images("validation"),
            "test_images": self._images("test")}
        self.packing = self._pack()
        results = Results(self.state, self.settings, self.space, registry, survey, self.log)
        self._trials(results)
        if {each["depth"] for each in forecast} != set(self.rounds.depths):
            survey["forecast"] = self._remote(forecast_depths, self.bench, trained_here)
        survey["ridge"] = self._ridge()
        self._finals(results)
        return results.publish(self.options.output)

    # Room ------------------------------------------------------------------------------------

    def _resources(self) -> None:
        """What a trial is given, as far as it is known before features are."""
        options, device, nodes = self.options, self.config.compute.device, cluster_nodes()
        gpus = options.gpus_per_trial
        if gpus is None:
            gpus = GPU_SHARE if any(node.gpus for node in nodes) else 0.0
        if device == "cpu":
            gpus = 0.0
        elif device == "gpu" and gpus == 0:
            raise InputError("device is 'gpu' and a trial gets no share of one; allowed: a cluster "
                             "with a GPU, and gpus_per_trial above 0")
        self.need = Room(options.cpus_per_trial, gpus, 0)
        self.threads = self.config.compute.threads or max(1, int(options.cpus_per_trial))
        self.device = WorkerDevice.with_share(gpus)
        pack(self.need, nodes)

    def _pack(self) -> Packing:
        """How many trials run at once, stated; refuses with the arithmetic where none fits."""
        by_task: dict[tuple[int, str], int] = {}
        for (depth, task, _), manifest in self.bench.manifests.items():
            by_task[depth, task] = by_task.get((depth, task), 0) + manifest.bytes
        self.need = dataclasses.replace(self.need, memory=TRIAL_MEMORY + max(by_task.values()))
        packing = pack(self.need, cluster_nodes(), self.options.trials_at_once)
        self.log(f"trials: {packing}")
        return packing

    def _most_views(self) -> Config:
        """The configuration that features are stored for: as many views as any trial uses."""
        return self.space.config(self.config, {"features.views": self.space.largest(
            "features.views", self.config.features.views)})

    def _bench(self, experiences: Sequence[Experience]) -> Bench:
        """The stored features of some tasks at the depths of all rounds, and what else trials
        share.
        """
        compute = self.config.compute
        progress = Progress(self.config, self.log)
        workers = compute.feature_workers
        run = on_ray(workers, self.trunk_device, self.threads,
                     decoding_actors(self.trunk_device, workers))
        on = Computing(run, progress.features, progress.line, self.in_use)
        wanted = self.rounds.depths
        manifests, decoded = depth_features(self.storage, self.network, self._most_views(),
                                            experiences, sorted({*self.together, *wanted}), on)
        manifests = {place: each for place, each in manifests.items() if place[0] in wanted}
        progress.features_done(list(manifests.values()), decoded)
        return Bench(self.storage, self.network,
                     tuple((each.name, tuple(each.classes)) for each in experiences), manifests,
                     f"{self.state.folder}/running", self.device, self.threads,
                     compute, self.settings["options"]["unknown_task"])

    def _ridge(self) -> dict[str, float]:
        """Held-out accuracy of ridge regression by depth, measured once for each round's depths.

        It is given the task, so where trials are not, it has no place beside them.
        """
        known: dict[str, float] = {}
        if self.bench.unknown_task:
            return known
        for index, each in enumerate(self.rounds.all):
            new = [depth for depth in each.depths if str(depth) not in known]
            name = f"ridge-{index}" if index else "ridge"
            if new:
                known |= self.state.keep(name, functools.partial(
                    self._remote, ridge_accuracies, self.bench, new))
        return known

    def _images(self, split: str) -> list[int]:
        """Images of a split, by task."""
        depth = self.rounds.depths[0]
        return [self.bench.manifests[depth, name, split].rows for name, _ in self.bench.tasks]

    def _remote(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer of a function that runs on the cluster, with a trial's resources."""
        import ray

        remote = ray.remote(num_cpus=self.need.cpus, num_gpus=self.need.gpus)(function)
        try:
            return ray.get(remote.remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):  # without the worker's traceback
                raise error.cause from None
            raise

    # Trials ----------------------------------------------------------------------------------

    def _trials(self, results: "Results") -> None:
        """Trials until the budget is spent, one round after the other."""
        saved = self.settings["options"]
        goal = Goal(saved["algorithm"], saved["sampler_seed"], saved["objective"],
                    saved["max_loss"])
        proposals = Proposals(self.space, self.config, goal, results.records, self.rounds)
        planned = [plan for plan in self.state.interrupted() if plan.kind == "search"]
        begun = [int(plan.id) for plan in [*planned, *(each.plan for each in results.records)]
                 if plan.kind == "search"]
        self.number = max(begun, default=-1) + 1
        budget, least = parse_budget(saved["budget"]), len(self.space.grid_points())

        def more() -> TrialPlan | None:
            spent = self._spent(budget, self.number, results)
            if self.rounds.over(self.number, spent) or (self.number >= least and spent >= 1):
                return None
            self.number += 1
            return proposals.propose(self.number - 1)

        def ended(record: TrialRecord) -> None:
            proposals.learn(record)
            results.add(record)

        while True:
            asha = AshaByDepth(len(self.experiences), results.records) if (
                saved["early_stopping"] == "asha") else None
            self._run(TrialSource(self.state, planned, more, ended, results.seconds), asha)
            planned, spent = [], self._spent(budget, self.number, results)
            best = results.best_depth()
            if spent >= 1 or best is None or not self.rounds.over(self.number, spent):
                return
            self._next_round(best)

    def _spent(self, budget: Budget, number: int, results: "Results") -> float:
        """The share of the budget for trials that is used before trial `number`; from 1 no other
        trial begins. The final runs still to come keep their part of it.
        """
        if budget.trials is not None:
            return number / budget.trials
        assert budget.seconds is not None
        finals = results.final_seconds(self.settings["options"]["seeds"]) / self.packing.at_once
        return results.seconds() / (budget.seconds - min(finals, FINAL_SHARE * budget.seconds))

    def _next_round(self, best: int) -> None:
        """Adds the round that follows, with the features of its depths."""
        before = set(self.rounds.depths)
        add_round(self.state, self.rounds, self.number, best)
        new = sorted(set(self.rounds.depths) - before)
        if new:
            names = ", ".join(f"depth {depth} (freezing {self.depths.freezing(depth)})"
                              for depth in new)
            self.log(f"depth {best} is the best so far; next, around it: {names}")
            self.bench = self._bench(self.experiences)
            self.packing = self._pack()

    def _finals(self, results: "Results") -> None:
        """The best trial of each depth under new seeds, and separate heads beside it."""
        done = {record.plan.id for record in results.records}
        planned = [plan for plan in results.final_plans(self.settings["options"]["seeds"])
                   if plan.id not in done]
        if planned:
            self.log(f"final runs: {len(planned)} (the best trial of each depth under other "
                     "seeds, and separate heads beside it)")
            self._run(TrialSource(self.state, planned, lambda: None, results.add,
                                  results.seconds), None)

    def _threads_here(self) -> int:
        """How many trials share this process, on this machine's GPU; 1 where they are Ray Tune's:
        without a GPU, on several machines, or with a share of a GPU that was asked for.
        """
        import torch

        from partialhn.training.together import AT_ONCE, WORKING_BYTES, at_once

        if (not self.need.gpus or self.options.gpus_per_trial is not None
                or len(cluster_nodes()) > 1 or not torch.cuda.is_available()):
            return 1
        need = int(self.need.memory) - TRIAL_MEMORY + WORKING_BYTES
        wanted = self.options.trials_at_once or AT_ONCE
        return at_once(wanted, [need] * wanted, torch.device("cuda"), self.log)

    def _run(self, source: TrialSource, scheduler: Any) -> None:
        """Runs trials until the source has no more of them and all have ended: in threads of this
        process, or by Ray Tune.
        """
        count = self._threads_here()
        if count > 1:
            self.log(f"trials: {count} at once share this process and its GPU")
            bench = dataclasses.replace(self.bench, device=WorkerDevice.with_share(1.0))
            TrialThreads(source, scheduler, bench, count, self.log).run()
        else:
            self._run_on_ray(source, scheduler)

    def _run_on_ray(self, source: TrialSource, scheduler: Any) -> None:
        from ray import tune
        from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner

        trainable = tune.with_resources(
            tune.with_parameters(run_trial, bench=self.bench),
            {"cpu": self.need.cpus, "gpu": self.need.gpus, "memory": self.need.memory})
        with tempfile.TemporaryDirectory(prefix="partialhn-tune-") as scratch, _quiet():
            Tuner(trainable, tune_config=TuneConfig(
                search_alg=source, scheduler=scheduler, num_samples=-1, reuse_actors=True,
                max_concurrent_trials=self.packing.at_once),
                run_config=RunConfig(name="trials", storage_path=scratch, verbose=0,
                                     failure_config=FailureConfig(max_failures=MAX_FAILURES)),
            ).fit()
        if source.error:
            raise source.error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Our own lines instead of Ray Tune's; its warnings about trials stay in our records."""
    names = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0",
             "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


