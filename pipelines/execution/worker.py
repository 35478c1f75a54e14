"""The worker: learns the experiences of a stream, one after the other, wherever it runs.

A worker runs in a `Host`: this process (`local.ProcessHost`) or a worker process of Ray Train
(`on_ray.RayHost`). It sends every record to the host at once and stores a model after every
finished task. It hands its state to the host at the end of each task, and every few seconds in
between. Several workers divide independent tasks and baselines among themselves (`task_share`), or
they divide every batch.
"""

import dataclasses
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
from partialhn.networks.precision import configure_torch
from partialhn.run import TrunkAndHead, with_strategy
from partialhn.training import lineage
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Outcome, model_sizes, peak_rss_bytes
from partialhn.training.slots import Slot, open_task_features
from partialhn.training.steps import recorder_for
from pipelines.execution.run_states import SECONDS
from pipelines.execution.task_share import BaselineShare, TaskShare, WorkerRank
from pipelines.features.produce import open_store
from pipelines.platform.storage import Storage

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
        self.rank = WorkerRank(assignment.storage, assignment.run, assignment.folder,
                               assignment.attempt, self.workers.rank, self.workers.world)
        config = assignment.config
        self.by_tasks = (self.workers.world > 1 and config.compute.share == "tasks"
                         and assignment.cut.strategy(config).independent)

    def run(self) -> dict[str, Any]:
        """Learns the tasks that are not learned yet, with the strategy and every baseline.

        Returns a dict of `outcomes` by strategy, `device` and `peak_rss_bytes`. Raises: InputError
        for any error that the user can correct.
        """
        a = self.assignment
        store = open_store(a.storage, a.config.compute)
        known = self._known()
        tasks = open_task_features(store, a.slots, self._own_tasks(len(known)))
        if self.by_tasks:
            with self.rank.failing_together():
                self._share(tasks, known)
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
        """The tasks whose training features this worker needs."""
        count = len(self.assignment.slots)
        if self.assignment.config.train.needs_every_task:
            return range(count)
        return self.rank.own_tasks(known, count) if self.by_tasks else range(known, count)

    def _new_learner(self, name: StrategyName, workers: Workers,
                     inference: Detector | None = None) -> Learner:
        a = self.assignment
        return Learner(a.cut.strategy(with_strategy(a.config, name)), a.config.train,
                       self.device, workers, inference,
                       recorder_for(self.device, a.config.compute.cuda_graphs),
                       re_evaluate=a.config.compute.re_evaluate)

    def _detector(self) -> Detector:
        """An empty detector."""
        train = self.assignment.config.train
        return Detector(train.detector_features, train.false_alarms)

    def _share(self, tasks: list[TaskFeatures], known: list[lineage.Learned]) -> None:
        """Learns whole tasks, one for each worker at a time; then whole baselines.

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
        TaskShare(self.rank, a.lineage_ids, tasks, lambda: self._new_learner(name, Workers()),
                  self._detector, lambda record: self.host.send(name, record), model,
                  self._keep_model).learn(len(known))
        baselines = BaselineShare(self.rank, tasks, a.config.train.compare,
                                  lambda baseline: self._new_learner(baseline, Workers()),
                                  self.host.send)
        outcome = lineage.outcome_of(self._known())
        self.outcomes = {name: outcome} | baselines.learn()

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
        due = torch.tensor(float(time.monotonic() - self.last_kept > SECONDS),
                           device=self.device)
        if self.workers.world > 1:  # all workers must decide alike
            torch.distributed.broadcast(due, 0)
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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads a worker"
