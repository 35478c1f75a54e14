"""A stream whose tasks are learned several at once, in this process (`together`)."""

import functools
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from partialhn.detector.detector import Detector
from partialhn.networks.tensors import tensors_below
from partialhn.task_inference import Inference, stored_inference
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.together import Lanes, Waiting

PAUSE = 0.05
"""Seconds after which the main thread looks for an error of the others."""


class _Learned(NamedTuple):
    """A task that a thread has learned."""

    task: int
    """Its index."""
    state: dict[str, Tensor]
    epochs: list[EpochRecord]
    train_seconds: float
    measured: dict[str, Tensor] | None


def learn_at_once(model: Learner, tasks: Sequence[TaskFeatures],
                  new_learners: Sequence[Callable[[], Learner]],
                  new_detector: Callable[[], Detector]) -> Iterator[EpochRecord | TaskRecord]:
    """As `model.learn(tasks)`, for a strategy whose tasks are `independent`, to the same weights.

    new_learners: for each thread, creates an empty learner of the model's strategy; threads share
    no head. Records of epochs come when they happen, those of tasks in order.
    """
    while len(model.finished) < len(tasks):
        ready = _ready(model, tasks)
        if len(ready) < 2 or len(new_learners) < 2:
            yield from model.learn_next(tasks)
        else:
            yield from _Round(model, tasks, new_detector).learn(ready, new_learners)


def _ready(model: Learner, tasks: Sequence[TaskFeatures]) -> range:
    """The next tasks, as long as the model has all that learning them needs."""
    end = done = len(model.finished)
    while end < len(tasks) and model.strategy.needs(end, tasks[end].refreshes, done) < done:
        end += 1
    return range(done, end)


class _Round:
    """Tasks that are learned at once, from the same state of the model."""

    def __init__(self, model: Learner, tasks: Sequence[TaskFeatures],
                 new_detector: Callable[[], Detector]) -> None:
        self._model, self._tasks, self._new_detector = model, tasks, new_detector
        tensors, self._fields = model.state()
        self._tensors = _on_host(tensors)
        self._out: queue.Queue[EpochRecord | _Learned] = queue.Queue()

    def learn(self, ready: range, new_learners: Sequence[Callable[[], Learner]],
              ) -> Iterator[EpochRecord | TaskRecord]:
        """Learns the tasks and puts them into the model."""
        model, waiting = self._model, Waiting(ready, len(new_learners))
        learned: dict[int, _Learned] = {}
        with Lanes(len(new_learners), model.device) as lanes:
            for new_learner in new_learners:
                learn = functools.partial(self._learn, new_learner, lanes)
                lanes.start(functools.partial(waiting.work_off, learn))
            while len(model.finished) < ready.stop:
                try:
                    record = self._out.get(timeout=PAUSE)
                except queue.Empty:
                    lanes.check()
                    continue
                if isinstance(record, EpochRecord):
                    yield record
                    continue
                learned[record.task] = record
                while (done := learned.pop(len(model.finished), None)) is not None:
                    yield model.load_task_state(self._tasks, done.state, done.epochs,
                                                done.train_seconds, done.measured)

    def _learn(self, new_learner: Callable[[], Learner], lanes: Lanes, index: int) -> None:
        learner = new_learner()
        learner.restore(self._tensors, self._fields)
        learner.skip_to(self._tasks, index)
        for record in learner.fit_next(self._tasks):
            lanes.go_on()
            self._out.put(record)
        inference, measured = self._inference(), None
        if inference is not None:
            measured = _on_host(learner.measure_task(self._tasks, index, inference))
        self._out.put(_Learned(
            index, _on_host(learner.strategy.task_state(index)),
            [record for record in learner.epochs if record.task_index == index],
            learner.train_seconds, measured))

    def _inference(self) -> Inference | None:
        """Task inference as the model has it, for this thread alone."""
        if self._model.inference is None:
            return None
        return stored_inference(tensors_below(self._tensors, "inference."),
                                len(self._fields["finished"]), self._new_detector())


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the host, where threads exchange them: each has a stream of its own."""
    return {name: value.cpu() for name, value in tensors.items()}
