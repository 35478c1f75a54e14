"""How the experiences of a stream are learned, one after the other, wherever a worker runs.

What a worker needs of its surroundings is a `Host`: this process (`worker_process`) or a worker of
Ray Train (`worker_ray`). It tells the host of every record as it comes, keeps a model of every
finished task, and gives the host its state at the end of each task and every few seconds between.
Several workers divide independent tasks and baselines among themselves (`task_share`), or they
divide every batch.
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
from partialhn.features.batches import Workers
from partialhn.networks.precision import configure_torch
from partialhn.run import CutNetwork, with_strategy
from partialhn.task_inference import TaskInference
from partialhn.training import lineage
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Outcome, model_sizes, peak_rss_bytes
from partialhn.training.slots import Slot, open_task_features
from partialhn.training.steps import recorder_for
from pipelines.execution.run_states import SECONDS
from pipelines.execution.task_share import BaselineShare, Place, TaskShare
from pipelines.features.produce import open_store
from pipelines.platform.storage import Storage

OnRecord = Callable[[str, EpochRecord | TaskRecord], None]
"""Gets the strategy and the record."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """All a worker needs to know."""

    config: Config
    cut: CutNetwork
    slots: tuple[Slot, ...]
    lineage_ids: tuple[str, ...]
    """Names of the models after each slot (`partialhn.training.lineage`)."""
    storage: Storage
    folder: str
    """Where finished tasks' models are and go, as a path in the storage's filesystem."""
    run: str
    """Folder of the run, named after all that is learned: a state that was kept there is gone on
    from."""
    threads: int
    attempt: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    """Tells this run from an earlier one in the same folder."""


class Host(Protocol):
    """Where a worker runs."""

    @property
    def device(self) -> torch.device:
        """What to learn on."""

    @property
    def workers(self) -> Workers:
        """This worker's place among those that share the work."""

    def send(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        """Tells the driver."""

    def keep(self, state: Path | None) -> None:
        """Keeps a checkpoint folder in place of the one before; None: another worker gives it."""

    def fetch(self, folder: Path) -> bool:
        """Copies the state kept last into a folder; False where there is none."""


class Worker:
    """One worker's way through the strategies and tasks."""

    def __init__(self, assignment: Assignment, host: Host) -> None:
        self.a, self.host = assignment, host
        configure_torch(assignment.threads)
        self.device, self.workers = host.device, host.workers
        self.outcomes: dict[str, Outcome] = {}
        self.last_kept = time.monotonic()
        self.place = Place(assignment.storage, assignment.run, assignment.folder,
                           assignment.attempt, self.workers.rank, self.workers.world)
        config = assignment.config
        self.by_tasks = (self.workers.world > 1 and config.compute.share == "tasks"
                         and assignment.cut.strategy(config).independent)

    def run(self) -> dict[str, Any]:
        """Learns what is not learned yet, by every strategy asked for.

        Returns `outcomes` by strategy, `device` and `peak_rss_bytes`. Raises: InputError for
        anything the user can set right.
        """
        a = self.a
        store = open_store(a.storage, a.config.compute)
        known = lineage.find(a.storage.filesystem, a.folder, a.lineage_ids)
        tasks = open_task_features(store, a.slots, self._own_tasks(len(known)))
        if self.by_tasks:
            with self.place.together():
                self._share(tasks, known)
        else:
            self._learn_all(tasks, known)
        return {"outcomes": self.outcomes, "peak_rss_bytes": peak_rss_bytes(),
                "device": _device_name(self.device)}

    def _learn_all(self, tasks: list[TaskFeatures], known: list[lineage.Learned]) -> None:
        """One strategy after the other, by this worker or by all together."""
        a, restored = self.a, self._restored()
        for name in (a.config.train.strategy, *a.config.train.compare):
            main = name == a.config.train.strategy
            if name in self.outcomes:
                continue
            learner = self._new_learner(name, self.workers, TaskInference() if main else None)
            ours = known if main else []
            if restored and restored[1]["strategy"] == name and (
                    len(restored[1]["learner"]["finished"]) >= len(ours)):
                learner.restore(restored[0], restored[1]["learner"])
            elif ours:  # what an earlier run, of fewer tasks, has learned
                learner.restore(*lineage.state(a.storage.filesystem, a.folder, ours))
            self._learn(name, learner, tasks)

    def _own_tasks(self, known: int) -> range:
        """The tasks whose training features this worker needs."""
        count = len(self.a.slots)
        if self.a.config.train.needs_every_task:
            return range(count)
        return self.place.own(known, count) if self.by_tasks else range(known, count)

    def _new_learner(self, name: StrategyName, workers: Workers,
                     inference: TaskInference | None = None) -> Learner:
        a = self.a
        return Learner(a.cut.strategy(with_strategy(a.config, name)), a.config.train,
                       self.device, workers, inference,
                       recorder_for(self.device, a.config.compute.cuda_graphs))

    def _share(self, tasks: list[TaskFeatures], known: list[lineage.Learned]) -> None:
        """Learns whole tasks, one for each worker at a time; then whole baselines.

        What is kept with the host has no part: all that is learned is in the storage.
        """
        a, name, model = self.a, self.a.config.train.strategy, None
        if self.workers.rank == 0:
            model = self._new_learner(name, Workers(), TaskInference())
            if known:
                model.restore(*lineage.state(a.storage.filesystem, a.folder, known))
        for done in known:
            self._send(name, done.record)
        TaskShare(self.place, a.lineage_ids, tasks, lambda: self._new_learner(name, Workers()),
                  lambda record: self.host.send(name, record), model,
                  self._keep_model).learn(len(known))
        baselines = BaselineShare(self.place, tasks, a.config.train.compare,
                            lambda baseline: self._new_learner(baseline, Workers()), self.host.send)
        ours = lineage.outcome_of(lineage.find(a.storage.filesystem, a.folder, a.lineage_ids))
        self.outcomes = {name: ours} | baselines.learn()

    def _learn(self, name: str, learner: Learner, tasks: list[TaskFeatures]) -> None:
        for done in learner.finished:
            self._send(name, done)
        if len(learner.finished) == len(tasks):
            self.outcomes[name] = Outcome.of(learner)
        for record in learner.learn(tasks):
            if isinstance(record, TaskRecord) and name == self.a.config.train.strategy:
                self._keep_model(learner, record)
            if len(learner.finished) == len(tasks):
                self.outcomes[name] = Outcome.of(learner)
            self._keep_state(name, learner, record)
            self._send(name, record)

    def _send(self, name: str, record: EpochRecord | TaskRecord) -> None:
        if self.workers.rank == 0:
            self.host.send(name, record)

    def _keep_model(self, learner: Learner, record: TaskRecord) -> None:
        """The model as it is after a task, for the driver to register."""
        if self.workers.rank:
            return
        a = self.a
        model = Model(a.config, a.cut.trunk, learner.strategy,
                      tuple(TaskInfo(slot.name, slot.classes)
                            for slot in a.slots[:record.task_index + 1]),
                      inference=learner.inference)
        model.facts |= model_sizes(model)
        done = lineage.Learned.of(Outcome.of(learner), a.lineage_ids, record.task_index)
        lineage.keep(model, done, a.storage.filesystem, a.folder)

    def _keep_state(self, name: str, learner: Learner, record: EpochRecord | TaskRecord) -> None:
        """The state for the host: always after a task, otherwise when the last is old."""
        late = torch.tensor(float(time.monotonic() - self.last_kept > SECONDS),
                            device=self.device)
        if self.workers.world > 1:
            torch.distributed.broadcast(late, 0)
        if isinstance(record, EpochRecord) and not late:
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
