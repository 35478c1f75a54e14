"""The worker: learns the experiences of a stream, one after the other, wherever it runs.

A worker runs in a `Host`: this process (`local.ProcessHost`) or a worker process of Ray Train
(`on_ray.RayHost`). It sends every record to the host at once and stores a model after every
finished task. It hands its state to the host at the end of each task, and every few seconds in
between. Several workers divide independent tasks and baselines among themselves (`task_share`), or
they divide every batch. One worker may learn several tasks at once, each in a thread.
"""

import dataclasses
import functools
import os
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from partialhn.checkpoints import checkpoint
from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import Config, StrategyName
from partialhn.detector.detector import Detector
from partialhn.features.batches import Workers
from partialhn.networks.precision import configure_torch, device_name
from partialhn.run import TrunkAndHead, with_strategy
from partialhn.training import lineage
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Outcome, model_sizes, peak_rss_bytes
from partialhn.training.slots import Slot, open_task_features
from partialhn.training.steps import recorder_for
from partialhn.training.together import Lanes, Waiting, at_once, needed_bytes, wanted_at_once
from pipelines.execution.run_states import SECONDS
from pipelines.execution.task_share import (
    SHORT_WAIT,
    WAIT,
    BaselineShare,
    TaskShare,
    WorkerRank,
)
from pipelines.features.produce import open_store
from pipelines.platform.storage import Storage

Shares = tuple[TaskShare, BaselineShare]
OnRecord = Callable[[str, EpochRecord | TaskRecord], None]
"""A function that is called with the name of the strategy and a record."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The work of a run, as all its workers get it."""

    config: Config
    cut: TrunkAndHead
    slots: tuple[Slot, ...]
    lineage_ids: tuple[str, ...]
    """Names of the models after each slot (`partialhn.training.lineage`)."""
    storage: Storage
    folder: str
    """Folder of the models after each task, as a path in the storage's filesystem."""
    run: str
    """Folder of the run, named after everything that is learned. A worker resumes from the state
    it finds there."""
    threads: int
    """CPU threads of a worker."""
    known: tuple[lineage.Learned, ...] = ()
    """The tasks that were learned before, so that no worker reads them again."""
    attempt: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    """Distinguishes this run from an earlier one in the same folder."""


class Host(Protocol):
    """The environment that a worker runs in."""

    @property
    def device(self) -> torch.device:
        """The device to learn on."""

    @property
    def workers(self) -> Workers:
        """The group of workers, and this worker's rank in it."""

    def send(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        """Sends a record to the driver."""

    def keep(self, state: Path | None) -> None:
        """Stores a checkpoint folder as the newest state; None if another worker provides it."""

    def fetch(self, folder: Path) -> bool:
        """Copies the newest state into a folder; returns False if there is none."""

    def say(self, line: str) -> None:
        """Shows the user a line."""


class Worker:
    """Learns an assignment, or one worker's share of it."""

    def __init__(self, assignment: Assignment, host: Host) -> None:
        self.assignment, self.host = assignment, host
        configure_torch(assignment.threads)
        self.device, self.workers = host.device, host.workers
        self.outcomes: dict[str, Outcome] = {}
        self.newest: tuple[str, Model, int] | None = None
        """The model after the last task that was learned here: its lineage id, itself, and the
        bytes of its files."""
        self.last_kept = time.monotonic()
        self._learned_before = 0
        alone = self.workers.world == 1 and assignment.storage.is_local
        self.rank = WorkerRank(assignment.storage, assignment.run, assignment.folder,
                               assignment.attempt, self.workers.rank, self.workers.world,
                               SHORT_WAIT if alone else WAIT)
        self.by_tasks = divides_tasks(assignment.config, assignment.cut)
        """Whether tasks may be learned in any order, by any worker."""

    def run(self) -> dict[str, Any]:
        """Learns the tasks that are not learned yet, with the strategy and every baseline.

        Returns a dict of `outcomes` by strategy, `device` and `peak_rss_bytes`. Raises: InputError
        for any error that the user can correct.
        """
        a = self.assignment
        store = open_store(a.storage, a.config.compute)
        known = self._known()
        self._learned_before = len(known)
        every = a.config.train.needs_every_task
        tasks = open_task_features(store, a.slots, range(len(a.slots)) if every
                                   else self._own_tasks(len(known)))
        at_once = self._at_once(tasks, len(known))
        # not by what is left: another run that was to learn several may have left results apart
        wanted = wanted_at_once(a.config.compute.tasks_at_once, self.device)
        if self.by_tasks and (self.workers.world > 1 or wanted > 1):
            with self.rank.failing_together():
                self._share(tasks, known, at_once)
        else:
            self._learn_all(tasks, known)
        return {"outcomes": self.outcomes, "peak_rss_bytes": peak_rss_bytes(),
                "device": _device_name(self.device)}

    def _known(self) -> list[lineage.Learned]:
        """The tasks that are learned by now."""
        a = self.assignment
        return lineage.find(a.storage.filesystem, a.folder, a.lineage_ids,
                            {learned.prefix: learned for learned in a.known})

    def _learn_all(self, tasks: list[TaskFeatures], known: list[lineage.Learned]) -> None:
        """Learns one strategy after the other, alone or together with all other workers."""
        a, restored = self.assignment, self._restored()
        for name in (a.config.train.strategy, *a.config.train.compare):
            is_main = name == a.config.train.strategy
            if name in self.outcomes:
                continue
            learner = self._new_learner(name, self.workers, self._detector() if is_main else None)
            learned = known if is_main else []
            if restored and restored[1]["strategy"] == name and (
                    len(restored[1]["learner"]["finished"]) >= len(learned)):
                learner.restore(restored[0], restored[1]["learner"])
            elif learned:  # by an earlier run with fewer tasks
                learner.restore(*lineage.state(a.storage.filesystem, a.folder, learned))
            self._learn(name, learner, tasks)

    def _own_tasks(self, known: int) -> range:
        """The tasks that this worker learns."""
        count = len(self.assignment.slots)
        return self.rank.own_tasks(known, count) if self.by_tasks else range(known, count)

    def _at_once(self, tasks: list[TaskFeatures], known: int) -> int:
        """How many tasks and baselines this worker learns at once; the first task is learned before
        all others.
        """
        if not self.by_tasks:
            return 1
        config, needs = self.assignment.config, [needed_bytes(task) for task in tasks]
        baselines = self.rank.own_baselines(config.train.compare)
        return at_once(config.compute.tasks_at_once,
                       [needs[index] for index in self._own_tasks(known) if index]
                       + [max(needs)] * len(baselines), self.device, self.host.say)

    def _new_learner(self, name: StrategyName, workers: Workers,
                     inference: Detector | None = None, cut: TrunkAndHead | None = None) -> Learner:
        """cut: that of a thread which learns beside others."""
        a = self.assignment
        return Learner((cut or a.cut).strategy(with_strategy(a.config, name)), a.config.train,
                       self.device, workers, inference,
                       recorder_for(self.device, a.config.compute.cuda_graphs),
                       re_evaluate=a.config.compute.re_evaluate)

    def _detector(self) -> Detector:
        """An empty detector."""
        train = self.assignment.config.train
        return Detector(train.detector_features, train.false_alarms)

    def _share(self, tasks: list[TaskFeatures], known: list[lineage.Learned],
               count: int) -> None:
        """Learns whole tasks, one for each worker at a time, or `count`; then whole baselines.

        The host's state is not used: all results are in the storage.
        """
        a, model = self.assignment, None
        name = a.config.train.strategy
        if self.workers.rank == 0:
            model = self._new_learner(name, Workers(), self._detector())
            if known:
                model.restore(*lineage.state(a.storage.filesystem, a.folder, known))
        for done in known:
            self._send(name, done.record)
        waiting = Waiting(self._own_tasks(len(known)), count, self.host.say)
        if count == 1:
            shares = self._shares(tasks, a.cut, model)
            shares[0].learn(waiting)
            shares[0].collect()
            for baseline in shares[1].own_names():
                shares[1].learn(baseline)
        else:
            shares = self._learn_at_once(tasks, waiting, model, count)
        if self.workers.rank == 0:
            outcome = lineage.outcome_of(self._known())
            self.outcomes = {name: outcome} | {baseline: shares[1].outcome(baseline)
                                               for baseline in a.config.train.compare}

    def _learn_at_once(self, tasks: list[TaskFeatures], waiting: Waiting[int],
                       model: Learner | None, count: int) -> Shares:
        """Learns in `count` threads; this one puts what is learned into the model meanwhile."""
        cuts = [self.assignment.cut.apart() for _ in range(count)]
        with Lanes(count, self.device) as lanes:
            shares = self._shares(tasks, self.assignment.cut, model, lanes.check)
            baselines = Waiting(shares[1].own_names(), count, self.host.say)

            def learn(cut: TrunkAndHead) -> None:
                configure_torch(self.assignment.threads)
                mine, bounds = self._shares(tasks, cut, None, lanes.go_on)
                with self.rank.failing_together():
                    mine.learn(waiting)
                    baselines.work_off(bounds.learn)

            for cut in cuts:
                lanes.start(functools.partial(learn, cut))
            shares[0].collect()
            lanes.wait()
        return shares

    def _shares(self, tasks: list[TaskFeatures], cut: TrunkAndHead, model: Learner | None,
                go_on: Callable[[], None] = lambda: None) -> Shares:
        """The tasks and baselines, as this thread learns them. go_on: raises where it must end."""
        a, name = self.assignment, self.assignment.config.train.strategy

        def send(strategy: str, record: EpochRecord | TaskRecord) -> None:
            go_on()
            self.host.send(strategy, record)

        def learner(strategy: StrategyName) -> Learner:
            return self._new_learner(strategy, Workers(), cut=cut)

        return (TaskShare(self.rank, a.lineage_ids, tasks, lambda: learner(name), self._detector,
                          functools.partial(send, name), model, self._keep_model, go_on,
                          self._learned_before),
                BaselineShare(self.rank, tasks, a.config.train.compare, learner, send, go_on))

    def _learn(self, name: str, learner: Learner, tasks: list[TaskFeatures]) -> None:
        for done in learner.finished:
            self._send(name, done)
        if len(learner.finished) == len(tasks):
            self.outcomes[name] = Outcome.of(learner)
        for record in learner.learn(tasks):
            if len(learner.finished) == len(tasks):
                self.outcomes[name] = Outcome.of(learner)
            if isinstance(record, TaskRecord) and name == self.assignment.config.train.strategy:
                self._keep_model(learner, record)  # which is all that is needed to go on
            else:
                self._keep_state(name, learner, record)
            self._send(name, record)

    def _send(self, name: str, record: EpochRecord | TaskRecord) -> None:
        if self.workers.rank == 0:
            self.host.send(name, record)

    def _keep_model(self, learner: Learner, record: TaskRecord) -> None:
        """Stores the model after a task, for the driver to register."""
        if self.workers.rank:
            return
        a = self.assignment
        model = Model(a.config, a.cut.trunk, learner.strategy,
                      tuple(TaskInfo(slot.name, slot.classes)
                            for slot in a.slots[:record.task_index + 1]),
                      inference=learner.inference)
        model.facts |= model_sizes(model)
        done = lineage.Learned.of(Outcome.of(learner), a.lineage_ids, record.task_index)
        size = lineage.keep(model, done, a.storage.filesystem, a.folder)
        self.newest = done.prefix, model, size

    def _keep_state(self, name: str, learner: Learner, record: EpochRecord | TaskRecord) -> None:
        """Hands the state to the host: after each task of a baseline, and when the last state is
        SECONDS old.
        """
        due = time.monotonic() - self.last_kept > SECONDS
        if self.workers.world > 1:  # all workers must decide alike
            first = torch.tensor(float(due), device=self.device)
            torch.distributed.broadcast(first, 0)
            due = bool(first)
        if isinstance(record, EpochRecord) and not due:
            return
        with tempfile.TemporaryDirectory() as scratch:
            state = None
            if self.workers.rank == 0:
                tensors, fields = learner.state()
                done = {key: dataclasses.asdict(value) for key, value in self.outcomes.items()}
                state = Path(scratch) / "state"
                checkpoint.save(state, "learner", tensors,
                                {"strategy": name, "learner": fields, "outcomes": done})
            self.host.keep(state)
        self.last_kept = time.monotonic()

    def _restored(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        with tempfile.TemporaryDirectory() as scratch:
            if not self.host.fetch(Path(scratch)):
                return None
            tensors, fields = checkpoint.load(Path(scratch), "learner")
        self.outcomes = {name: Outcome.from_fields(values)
                         for name, values in fields["outcomes"].items()}
        for name, outcome in self.outcomes.items():
            for record in outcome.finished:
                self._send(name, record)
        return tensors, fields


def divides_tasks(config: Config, cut: TrunkAndHead) -> bool:
    """Whether workers, and threads of one, learn whole tasks: those that depend on no other but the
    first. Else a worker learns one after the other.
    """
    return config.compute.share == "tasks" and cut.strategy(config).independent


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return device_name(device)
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads a worker"
