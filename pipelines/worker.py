"""What runs inside a Ray Train worker: the experiences of a stream, one after the other.

One run of Ray Train learns all tasks that are waiting, because starting a group of workers takes
far longer than learning a small task. Rank 0 sends every record to the driver as it comes, keeps
a model of every finished task, and reports a checkpoint to Ray Train at the end of each task and
every few seconds between.
"""

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from partialhn import chain, checkpoint
from partialhn.checkpoint import Model, TaskInfo
from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.result import Outcome, model_sizes, peak_rss_bytes
from partialhn.run import Parts, with_strategy
from partialhn.slots import Slot, open_features
from partialhn.task_inference import TaskInference
from partialhn.train import EpochRecord, Learner, TaskFeatures, TaskRecord, Workers
from pipelines.features import open_store
from pipelines.storage import Storage

CHECKPOINT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Assignment:
    """All a worker needs to know."""

    config: Config
    parts: Parts
    slots: tuple[Slot, ...]
    prefixes: tuple[str, ...]
    """Names of the models after each slot (`partialhn.chain`)."""
    storage: Storage
    folder: str
    """Where finished tasks' models are and go, as a path in the storage's filesystem."""
    threads: int
    events: Any
    """Handle of the driver's `Events` actor."""


def learn(loop_config: dict[str, Any]) -> dict[str, Any]:
    """The Ray Train worker function. Returns outcomes by strategy, or an `error` for the user."""
    try:
        return _Worker(loop_config["assignment"]).run()
    except InputError as error:  # trying again would fail again
        return {"error": str(error)}


class _Worker:
    """One worker's way through the strategies and tasks."""

    def __init__(self, assignment: Assignment) -> None:
        import ray.train
        from ray.train.torch import get_device

        self.a = assignment
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        torch.set_num_threads(assignment.threads)
        torch.set_flush_denormal(True)
        self.device = get_device()
        self.workers = Workers(rank, world, _data_parallel, _sum) if world > 1 else Workers()
        self.outcomes: dict[str, Outcome] = {}
        self.last_report = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Learns what is not learned yet, by every strategy asked for."""
        a = self.a
        store = open_store(a.storage, a.config.compute)
        known = chain.find(a.storage.filesystem, a.folder, a.prefixes)
        tasks = open_features(store, a.slots,
                              0 if a.config.train.needs_every_task else len(known))
        restored = self._restored()
        for name in (a.config.train.strategy, *a.config.train.compare):
            if name not in self.outcomes:
                config = with_strategy(a.config, name)
                main = name == a.config.train.strategy
                learner = Learner(a.parts.strategy(config), a.config.train, self.device,
                                  self.workers, TaskInference() if main else None)
                ours = known if main else []
                if restored and restored[1]["strategy"] == name and (
                        len(restored[1]["learner"]["finished"]) >= len(ours)):
                    learner.restore(restored[0], restored[1]["learner"])
                elif ours:  # what an earlier run, of fewer tasks, has learned
                    learner.restore(*chain.state(a.storage.filesystem, a.folder, ours))
                self._learn(name, learner, tasks)
        return {"outcomes": self.outcomes, "peak_rss_bytes": peak_rss_bytes(),
                "device": _device_name(self.device)}

    def _learn(self, name: str, learner: Learner, tasks: list[TaskFeatures]) -> None:
        for record in learner.finished:
            self._send(name, record)
        if len(learner.finished) == len(tasks):
            self.outcomes[name] = Outcome.of(learner)
        for record in learner.learn(tasks):
            if isinstance(record, TaskRecord) and name == self.a.config.train.strategy:
                self._keep_model(learner, record)
            if len(learner.finished) == len(tasks):
                self.outcomes[name] = Outcome.of(learner)
            self._report(name, learner, record)
            self._send(name, record)

    def _send(self, name: str, record: EpochRecord | TaskRecord) -> None:
        if self.workers.rank == 0:
            self.a.events.add.remote(name, record)

    def _keep_model(self, learner: Learner, record: TaskRecord) -> None:
        """The model as it is after a task, for the driver to register."""
        if self.workers.rank:
            return
        a = self.a
        model = Model(a.config, a.parts.trunk, learner.strategy,
                      tuple(TaskInfo(slot.name, slot.classes)
                            for slot in a.slots[:record.task_index + 1]),
                      inference=learner.inference)
        model.facts |= model_sizes(model)
        done = chain.Learned.of(Outcome.of(learner), a.prefixes, record.task_index)
        chain.keep(model, done, a.storage.filesystem, a.folder)

    def _report(self, name: str, learner: Learner, record: EpochRecord | TaskRecord) -> None:
        """A checkpoint for Ray Train: always after a task, otherwise when the last is old."""
        import ray.train

        late = torch.tensor(float(time.monotonic() - self.last_report > CHECKPOINT_SECONDS),
                            device=self.device)
        if self.workers.world > 1:
            torch.distributed.broadcast(late, 0)
        if isinstance(record, EpochRecord) and not late:
            return
        metrics = {"task_index": record.task_index, "finished": len(learner.finished)}
        with tempfile.TemporaryDirectory() as scratch:
            made = None
            if self.workers.rank == 0:
                tensors, fields = learner.state()
                done = {key: dataclasses.asdict(value) for key, value in self.outcomes.items()}
                checkpoint.save(Path(scratch) / "state", "learner", tensors,
                                {"strategy": name, "learner": fields, "outcomes": done})
                made = ray.train.Checkpoint.from_directory(str(Path(scratch) / "state"))
            ray.train.report(metrics, checkpoint=made)
        self.last_report = time.monotonic()

    def _restored(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        import ray.train

        found = ray.train.get_checkpoint()
        if found is None:
            return None
        # not `as_directory`: a process that is killed in it leaves the copy on the node's disk
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.fetch(found.filesystem, found.path, Path(scratch))
            tensors, fields = checkpoint.load(Path(scratch), "learner")
        self.outcomes = {name: Outcome.from_fields(values)
                         for name, values in fields["outcomes"].items()}
        for name, outcome in self.outcomes.items():
            for record in outcome.finished:
                self._send(name, record)
        return tensors, fields


def _data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    # unused: the first task trains the base of the generated weights, and its code has no part
    return torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)


def _sum(total: Tensor) -> Tensor:
    torch.distributed.all_reduce(total)
    return total


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads a worker"


