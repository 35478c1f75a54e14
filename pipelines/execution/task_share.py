"""Divides independent work among workers: whole tasks of the strategy, and whole baselines.

A task depends only on the task that it starts from, and with a dictionary on the first tasks, so a
worker needs only the model after these. The first worker puts the learned tasks together; the model
is bit for bit the one that a single worker would have learned. Each baseline is learned by one
worker. Workers exchange results only through the storage and do not wait for each other at every
step. A worker that learns several tasks at once (`partialhn.training.together`) has a thread for
each, and they exchange results in the same way.

    <run>/tasks/<lineage_id>/            a learned task that is not in a model yet
    <run>/tasks/<lineage_id>.running/    the state of a task that is being learned
    <run>/tasks/failed-<attempt>         the error of a worker that gave up; the others stop too
    <run>/bounds/<strategy>.json         the outcome of a learned baseline
    <run>/bounds/<strategy>.running/     the state of a baseline that is being learned

A worker that is started again resumes its own tasks and baselines.
"""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from partialhn.checkpoints import checkpoint
from partialhn.config import StrategyName
from partialhn.detector.detector import Detector
from partialhn.errors import DivergedError, InputError
from partialhn.networks.tensors import tensors_below
from partialhn.strategies import Strategy
from partialhn.task_inference import Inference, stored_inference
from partialhn.training import lineage
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Outcome
from partialhn.training.together import Waiting
from pipelines.execution.run_states import States
from pipelines.platform.storage import Storage

WAIT = 0.3
"""Seconds between two checks for the results of other workers."""
SHORT_WAIT = 0.02
"""The same where all that wait are threads of one process with a local storage."""


@dataclasses.dataclass(frozen=True)
class WorkerRank:
    """One worker of the group, and the folders through which the group exchanges results."""

    storage: Storage
    run: str
    """Folder of the run, as a path in the storage's filesystem."""
    models: str
    """Folder of the models after each task (`partialhn.training.lineage`)."""
    attempt: str
    """Name of this run, so that the failure of an earlier run is not mistaken for one of this."""
    rank: int
    """This worker's number, from 0 to world - 1."""
    world: int
    """Number of workers."""
    pause: float = WAIT
    """Seconds between two checks for the results of others."""

    def own_tasks(self, known: int, count: int) -> range:
        """Indices of this worker's tasks among `count`, of which the first `known` are learned."""
        return range(known + (self.rank - known) % self.world, count, self.world)

    def own_baselines(self, names: Sequence[StrategyName]) -> Sequence[StrategyName]:
        """This worker's baselines, which are dealt out beginning with the last worker."""
        return names[self.world - 1 - self.rank::self.world]

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """A context: an InputError raised in it stops the other workers, too."""
        try:
            yield
        except InputError as error:
            self.storage.write_text(self._failure, json.dumps(error_fields(error)))
            raise

    def wait(self) -> None:
        """Waits a moment for the other workers. Raises: InputError if one of them gave up."""
        if self.storage.exists(self._failure):
            raise error_of(json.loads(self.storage.read_text(self._failure)))
        time.sleep(self.pause)

    @property
    def _failure(self) -> str:
        return f"{self.run}/tasks/failed-{self.attempt}"


def error_fields(error: InputError) -> dict[str, str]:
    """An error as plain values, to tell it to another process."""
    diverged = {"diverged": error.task} if isinstance(error, DivergedError) else {}
    return {"error": str(error), **diverged}


def error_of(fields: Mapping[str, str]) -> InputError:
    """The error of `error_fields`."""
    if "diverged" in fields:
        return DivergedError(fields["error"], fields["diverged"])
    return InputError(fields["error"])


class TaskShare:
    """One worker's share of the tasks."""

    def __init__(self, worker: WorkerRank, lineage_ids: Sequence[str],
                 tasks: Sequence[TaskFeatures], new_learner: Callable[[], Learner],
                 new_detector: Callable[[], Detector],
                 send: Callable[[EpochRecord | TaskRecord], None], model: Learner | None,
                 keep: Callable[[Learner, TaskRecord], None],
                 go_on: Callable[[], None] = lambda: None, known: int = 0) -> None:
        """Stores the arguments; nothing is learned yet.

        new_learner: creates an empty learner for a single task, and new_detector an empty detector
        for it. send: is called with every record;
        the epochs of a task come a second time, together, before its task record. model: on the
        first worker, the learner into which learned tasks are put; `keep` is called after each.
        go_on: is called while this waits for others, and raises where they have failed.
        known: number of tasks that were learned before.
        """
        self.worker, self.lineage_ids, self.tasks = worker, lineage_ids, tasks
        self._new_learner, self._new_detector = new_learner, new_detector
        self._send, self._model, self._keep, self._go_on = send, model, keep, go_on
        self._known = known
        self._let_earlier: Callable[[], None] = lambda: None
        self._folder = f"{worker.run}/tasks"
        self._filesystem = worker.storage.filesystem

    def learn(self, waiting: Waiting[int]) -> None:
        """Learns tasks as long as some wait, and puts what is learned into the model in between.

        Raises: InputError for any error that the user can correct, here or on another worker.
        """
        self._let_earlier = waiting.let_earlier

        def learn(index: int) -> None:
            self._learn(index)
            self._load_learned()
        waiting.work_off(learn)

    def collect(self) -> None:
        """Waits until all tasks are learned, also those of others. Raises: as `learn`."""
        self._wait_for(len(self.tasks) - 1)

    def _load_learned(self) -> None:
        """Loads learned tasks into the model, in order, until the next one is not yet learned."""
        model = self._model
        while model is not None and len(model.finished) < len(self.tasks):
            folder = self._task_folder(len(model.finished))
            with tempfile.TemporaryDirectory() as scratch:
                if not checkpoint.fetch(self._filesystem, folder, Path(scratch)):
                    return
                tensors, fields = checkpoint.load(Path(scratch), "task")
            epochs = [EpochRecord(**epoch) for epoch in fields["epochs"]]
            for epoch in epochs:
                self._send(epoch)
            record = model.load_task_state(
                self.tasks, tensors_below(tensors, "strategy."), epochs, fields["train_seconds"],
                tensors_below(tensors, "statistics."))
            self._keep(model, record)
            self._send(record)
            self.worker.storage.delete(folder)

    def _learn(self, index: int) -> None:
        """Learns one task and stores its state, unless it is learned already."""
        if self._is_kept(index) or self._has_fields(self._task_folder(index)):
            return
        learner = self._new_learner()
        states = States(self.worker.storage, f"{self._task_folder(index)}.running")
        restored = states.load("learner")
        if restored:
            learner.restore(*restored)
        else:
            self._start(learner, index)
        for record in learner.fit_next(self.tasks):
            self._send(record)
            if states.due:
                states.save("learner", *learner.state())
        inference = self._inference_before(learner.strategy, index)
        measured = learner.measure_task(self.tasks, index, inference)
        task_state = learner.strategy.task_state(index)
        tensors = {f"strategy.{name}": value for name, value in task_state.items()}
        tensors |= {f"statistics.{name}": value for name, value in measured.items()}
        epochs = [dataclasses.asdict(epoch) for epoch in learner.epochs
                  if epoch.task_index == index]
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.save(Path(scratch) / "task", "task", tensors,
                            {"epochs": epochs, "train_seconds": learner.train_seconds})
            checkpoint.upload(Path(scratch) / "task", self._filesystem, self._task_folder(index))
        states.delete()

    def _start(self, learner: Learner, index: int) -> None:
        """Restores the model that the task starts from in an empty learner."""
        if index:
            learner.restore(*self._state_before(learner.strategy, index)[:2])
            learner.skip_to(self.tasks, index)

    def _state_before(self, strategy: Strategy,
                      index: int) -> tuple[dict[str, Tensor], dict[str, Any], int]:
        """The stored model that a task after the first needs, and its number of slots."""
        start = strategy.needs(index, self.tasks[index].refreshes, self._known)
        self._wait_for(start)
        folder, lineage_ids = self.worker.models, self.lineage_ids[:start + 1]
        learned = lineage.find(self._filesystem, folder, lineage_ids)
        return *lineage.state(self._filesystem, folder, learned), start + 1

    def _inference_before(self, strategy: Strategy, index: int) -> Inference:
        """Task inference as far as the statistics of a task depend on it: its kind, and the slot
        that the task refreshes.
        """
        if not index:
            return self._new_detector()
        tensors, _, slots = self._state_before(strategy, index)
        return stored_inference(tensors_below(tensors, "inference."), slots, self._new_detector())

    def _wait_for(self, index: int) -> None:
        """Waits for the model after a task. Raises: InputError if another worker gave up."""
        self._load_learned()
        while not self._is_kept(index):
            self._go_on()
            self._let_earlier()
            self.worker.wait()
            self._load_learned()

    def _is_kept(self, index: int) -> bool:
        """Whether the model after a task is stored."""
        return self._has_fields(f"{self.worker.models}/{self.lineage_ids[index]}")

    def _has_fields(self, folder: str) -> bool:
        return checkpoint.read_fields(self._filesystem, folder) is not None

    def _task_folder(self, index: int) -> str:
        return f"{self._folder}/{self.lineage_ids[index]}"


class BaselineShare:
    """One worker's share of the baselines."""

    def __init__(self, worker: WorkerRank, tasks: Sequence[TaskFeatures],
                 names: Sequence[StrategyName],
                 new_learner: Callable[[StrategyName], Learner],
                 send: Callable[[StrategyName, EpochRecord | TaskRecord], None],
                 go_on: Callable[[], None] = lambda: None) -> None:
        """go_on: as in `TaskShare`."""
        self.worker, self.tasks, self.names = worker, tasks, names
        self._new_learner, self._send, self._go_on = new_learner, send, go_on

    def own_names(self) -> Sequence[StrategyName]:
        """The baselines of this worker."""
        return self.worker.own_baselines(self.names)

    def learn(self, name: StrategyName) -> None:
        """Learns a baseline and stores its outcome, unless it is learned already.

        Raises: InputError, as `TaskShare.learn`.
        """
        if self.worker.storage.exists(self._outcome_file(name)):
            return
        storage, learner = self.worker.storage, self._new_learner(name)
        states = States(storage, f"{self.worker.run}/bounds/{name}.running")
        restored = states.load("learner")
        if restored:
            learner.restore(*restored)
        for done in learner.finished:
            self._send(name, done)
        for record in learner.learn(self.tasks):
            self._send(name, record)
            if states.due or isinstance(record, TaskRecord):
                states.save("learner", *learner.state())
        storage.write_text(self._outcome_file(name),
                           json.dumps(dataclasses.asdict(Outcome.of(learner))))
        states.delete()

    def outcome(self, name: StrategyName) -> Outcome:
        """The outcome of a baseline, once it is learned."""
        file = self._outcome_file(name)
        while not self.worker.storage.exists(file):
            self._go_on()
            self.worker.wait()
        return Outcome.from_fields(json.loads(self.worker.storage.read_text(file)))

    def _outcome_file(self, name: StrategyName) -> str:
        return f"{self.worker.run}/bounds/{name}.json"
