"""Independent work, divided among workers: whole tasks of the strategy, and baselines as a whole.

What a task becomes depends on no other but the one it starts from, so a worker needs that one's
model only, and what it leaves behind fits into the model that one worker would have learned, to
the bit; the first worker puts tasks together. Each of the strategies to compare with is learned by
one worker. Workers meet in the storage alone: none waits for another at every step.

    <run>/tasks/<lineage_id>/            a task that was learned and is not in a model yet
    <run>/tasks/<lineage_id>.running/    the state of one that is being learned
    <run>/tasks/failed-<attempt>     why a worker gave up, for the others to give up too
    <run>/bounds/<strategy>.json     what a baseline did, once it is learned
    <run>/bounds/<strategy>.running/ its state until then

A worker that is started again goes on with what is its own.
"""

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from partialhn.checkpoints import checkpoint
from partialhn.config import StrategyName
from partialhn.errors import InputError
from partialhn.networks.tensors import tensors_below
from partialhn.task_inference import TaskStatistics, statistics
from partialhn.training import lineage
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Outcome
from pipelines.execution.run_states import States
from pipelines.platform.storage import Storage

WAIT = 0.3
"""Seconds between two looks for what another worker has done."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where workers meet, and which one this is."""

    storage: Storage
    run: str
    """Folder of the run, as a path in the storage's filesystem."""
    models: str
    """Folder of the models after each task (`partialhn.training.lineage`)."""
    attempt: str
    """Tells a failure of this run from one of an earlier run."""
    rank: int
    world: int

    def own(self, known: int, count: int) -> range:
        """This worker's share of so many tasks, of which the first `known` are learned."""
        return range(known + (self.rank - known) % self.world, count, self.world)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What stops this worker within it for the user's sake stops the others, too."""
        try:
            yield
        except InputError as error:
            self.storage.write_text(self._failure, str(error))
            raise

    def wait(self) -> None:
        """Waits a little for the other workers. Raises: InputError where one gave up."""
        if self.storage.exists(self._failure):
            raise InputError(self.storage.read_text(self._failure))
        time.sleep(WAIT)

    @property
    def _failure(self) -> str:
        return f"{self.run}/tasks/failed-{self.attempt}"


class TaskShare:
    """One worker's part."""

    def __init__(self, place: Place, lineage_ids: Sequence[str], tasks: Sequence[TaskFeatures],
                 new_learner: Callable[[], Learner],
                 send: Callable[[EpochRecord | TaskRecord], None], model: Learner | None,
                 keep: Callable[[Learner, TaskRecord], None]) -> None:
        """new_learner: makes an empty one, for a task on its own. send: gets every record; the
        epochs of a task come once more, together, before the record of its end. model: of the
        first worker, where learned tasks are put together; `keep` is called after each.
        """
        self.place, self.lineage_ids, self.tasks = place, lineage_ids, tasks
        self._new_learner, self._send, self._model, self._keep = new_learner, send, model, keep
        self._folder = f"{place.run}/tasks"
        self._filesystem = place.storage.filesystem

    def learn(self, known: int) -> None:
        """Learns this worker's share of the tasks from `known` on; returns when all are learned,
        by whomever.

        Raises: InputError for anything the user can set right, here or on another worker.
        """
        for index in self.place.own(known, len(self.tasks)):
            self._learn(index)
            self._take_in()
        self._wait_for(len(self.tasks) - 1)

    def _take_in(self) -> None:
        """Puts the tasks that are learned into the model, in order, as far as there are any."""
        model = self._model
        while model is not None and len(model.finished) < len(self.tasks):
            folder = self._learned(len(model.finished))
            with tempfile.TemporaryDirectory() as scratch:
                if not checkpoint.fetch(self._filesystem, folder, Path(scratch)):
                    return
                tensors, fields = checkpoint.load(Path(scratch), "task")
            epochs = [EpochRecord(**each) for each in fields["epochs"]]
            for each in epochs:
                self._send(each)
            record = model.load_task_state(
                self.tasks, tensors_below(tensors, "strategy."), epochs, fields["train_seconds"],
                TaskStatistics(**tensors_below(tensors, "statistics.")))
            self._keep(model, record)
            self._send(record)
            self.place.storage.delete(folder)

    def _learn(self, index: int) -> None:
        """Learns one task, unless that was done before, and stores what it owns."""
        if self._is_kept(index) or self._has_fields(self._learned(index)):
            return
        learner = self._new_learner()
        states = States(self.place.storage, f"{self._learned(index)}.running")
        restored = states.load("learner")
        if restored:
            learner.restore(*restored)
        else:
            self._start(learner, index)
        for record in learner.fit_next(self.tasks):
            self._send(record)
            if states.due:
                states.save("learner", *learner.state())
        train = self.tasks[index].train
        assert train is not None, f"{self.tasks[index].name} was trained"
        found = statistics(train, index, learner.config.seed)._asdict()
        owned = learner.strategy.task_state(index)
        tensors = {f"strategy.{name}": value for name, value in owned.items()}
        tensors |= {f"statistics.{name}": value for name, value in found.items()}
        epochs = [dataclasses.asdict(each) for each in learner.epochs if each.task_index == index]
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.save(Path(scratch) / "task", "task", tensors,
                            {"epochs": epochs, "train_seconds": learner.train_seconds})
            checkpoint.upload(Path(scratch) / "task", self._filesystem, self._learned(index))
        states.delete()

    def _start(self, learner: Learner, index: int) -> None:
        """Brings an empty learner to where the task starts from."""
        if not index:
            return
        refreshes = self.tasks[index].refreshes
        start = 0 if refreshes is None else refreshes
        self._wait_for(start)
        folder, lineage_ids = self.place.models, self.lineage_ids[:start + 1]
        learned = lineage.find(self._filesystem, folder, lineage_ids)
        learner.restore(*lineage.state(self._filesystem, folder, learned))
        learner.skip_to(self.tasks, index)

    def _wait_for(self, index: int) -> None:
        """Returns when the model after a task is kept. Raises: InputError where others gave up."""
        self._take_in()
        while not self._is_kept(index):
            self.place.wait()
            self._take_in()

    def _is_kept(self, index: int) -> bool:
        return self._has_fields(f"{self.place.models}/{self.lineage_ids[index]}")

    def _has_fields(self, folder: str) -> bool:
        return checkpoint.read_fields(self._filesystem, folder) is not None

    def _learned(self, index: int) -> str:
        return f"{self._folder}/{self.lineage_ids[index]}"


class BaselineShare:
    """One worker's part of the strategies to compare with: from the last worker on, in turn."""

    def __init__(self, place: Place, tasks: Sequence[TaskFeatures], names: Sequence[StrategyName],
                 new_learner: Callable[[StrategyName], Learner],
                 send: Callable[[StrategyName, EpochRecord | TaskRecord], None]) -> None:
        self.place, self.tasks, self.names = place, tasks, names
        self._new_learner, self._send = new_learner, send

    def learn(self) -> dict[str, Outcome]:
        """Learns this worker's share; returns what all baselines did, on the first worker alone.

        Raises: InputError, as `TaskShare.learn`.
        """
        place = self.place
        for name in self.names[place.world - 1 - place.rank::place.world]:
            if not place.storage.exists(self._done(name)):
                self._learn(name)
        return {name: self._outcome(name) for name in self.names} if place.rank == 0 else {}

    def _learn(self, name: StrategyName) -> None:
        storage, learner = self.place.storage, self._new_learner(name)
        states = States(storage, f"{self.place.run}/bounds/{name}.running")
        restored = states.load("learner")
        if restored:
            learner.restore(*restored)
        for done in learner.finished:
            self._send(name, done)
        for record in learner.learn(self.tasks):
            self._send(name, record)
            if states.due or isinstance(record, TaskRecord):
                states.save("learner", *learner.state())
        storage.write_text(self._done(name), json.dumps(dataclasses.asdict(Outcome.of(learner))))
        states.delete()

    def _outcome(self, name: StrategyName) -> Outcome:
        while not self.place.storage.exists(self._done(name)):
            self.place.wait()
        return Outcome.from_fields(json.loads(self.place.storage.read_text(self._done(name))))

    def _done(self, name: StrategyName) -> str:
        return f"{self.place.run}/bounds/{name}.json"
