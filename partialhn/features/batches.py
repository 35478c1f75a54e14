"""Batches of a task's features, in an order that depends on a seed alone.

Legend: N images, E steps of an epoch, B batch, C channels, H W spatial.
"""

import abc
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.features.feature_set import FeatureSet
from partialhn.numbers import counted

RESIDENT_BYTES = 4 << 30
"""Features or images up to this many bytes are held in the device's memory. Batches of larger ones
are read on the host while the step before is computed."""


class FeatureBatch(NamedTuple):
    """Frozen-trunk features of one batch, all of one task.

    z_BCHW: features, float32 or as they are stored. y_B: int64 labels, 0 to K-1 within the task.
    loss_scale: a factor for this worker's mean loss, so that the mean over all workers is the mean
    over the global batch; 1 when every worker holds equally many rows. seed: the seed for every
    random draw of this step; the same for every worker.
    """

    z_BCHW: Tensor
    y_B: Tensor
    loss_scale: float
    seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Workers:
    """The group of workers that divides each batch, seen from one of them."""

    rank: int = 0
    """This worker's number, from 0 to world - 1."""
    world: int = 1
    """Number of workers."""
    data_parallel: Callable[[nn.Module], nn.Module] = lambda module: module
    """Wraps a module so that its gradients are averaged over the workers."""
    sum_over_workers: Callable[[Tensor], Tensor] = lambda total: total
    """Returns a tensor summed over the workers."""


class Order(NamedTuple):
    """The rows that one worker reads in an epoch, rows_EB, and the view of each, views_EB: int64.

    loss_scale: the same for every batch (`FeatureBatch.loss_scale`).
    """

    rows_EB: Tensor
    views_EB: Tensor
    loss_scale: float


def whole_batch(features: FeatureSet, batch_size: int, workers: Workers) -> int:
    """Number of rows in a batch, all workers together; a small task is a single batch.

    Raises: InputError for fewer images than workers.
    """
    if len(features) < workers.world:
        raise InputError(f"a task has {counted(len(features), 'training image')} for "
                         f"{workers.world} workers; allowed: at least one image for each worker")
    return min(batch_size, len(features))


def epoch_order(features: FeatureSet, batch_size: int, seed: Sequence[int],
                workers: Workers, passes: int = 1) -> Order:
    """The order of an epoch, drawn from `seed` alone; each worker gets its share of every batch.

    An epoch has `passes` passes over the images, each in an order of its own. Images that do not
    fill a last batch are left out of this epoch. Raises: InputError for fewer images than workers.
    """
    size = whole_batch(features, batch_size, workers)
    rng = np.random.default_rng(list(seed))
    drawn = [(rng.permutation(len(features)), rng.integers(0, features.views, len(features)))
             for _ in range(passes)]
    order_N, views_N = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    steps = len(order_N) // size
    rows_EB, views_EB = (
        torch.from_numpy(np.ascontiguousarray(
            x_N[:steps * size].reshape(steps, size)[:, workers.rank::workers.world]))
        for x_N in (order_N, views_N))
    return Order(rows_EB, views_EB, workers.world * rows_EB.shape[1] / size)


def epoch_batches(features: FeatureSet, batch_size: int, seed: Sequence[int],
                  workers: Workers, passes: int = 1) -> Iterator[FeatureBatch]:
    """The batches of `epoch_order`; each is read only when it is requested."""
    order = epoch_order(features, batch_size, seed, workers, passes)
    rows_EB, views_EB = (x_EB.to(features.y_N.device) for x_EB in order[:2])
    for step, (rows_B, views_B) in enumerate(zip(rows_EB, views_EB, strict=True)):
        yield FeatureBatch(features.gather(rows_B, views_B), features.y_N[rows_B], order.loss_scale,
                           (*seed, step))


class Batches(abc.ABC):
    """The batches that training steps read: `begin` starts an epoch, each call gives a batch."""

    steps_1: Tensor | None = None
    """Number of batches of all epochs that were read, on the device, where it is counted there."""

    def __init__(self, features: FeatureSet, batch_size: int, workers: Workers,
                 passes: int = 1) -> None:
        """passes: passes over the images in an epoch."""
        self._features, self._batch_size, self._workers = features, batch_size, workers
        self._passes = passes
        size = whole_batch(features, batch_size, workers)
        self.steps = passes * len(features) // size
        """Batches E of an epoch."""
        self.batch = len(range(workers.rank, size, workers.world))
        """Rows B of this worker's share of a batch."""

    @abc.abstractmethod
    def begin(self, seed: Sequence[int]) -> None:
        """Starts the epoch that belongs to `seed`: the next batch is its first."""

    @abc.abstractmethod
    def __call__(self) -> FeatureBatch:
        """The next batch."""


class MappedBatches(Batches):
    """Batches of memory-mapped features (too large for memory), read ahead by a thread."""

    def __init__(self, features: FeatureSet, batch_size: int, workers: Workers,
                 device: torch.device, passes: int = 1) -> None:
        super().__init__(features, batch_size, workers, passes)
        self._device = device
        self._batches: Iterator[FeatureBatch] = iter(())

    def begin(self, seed: Sequence[int]) -> None:
        self._batches = prefetched(epoch_batches(self._features, self._batch_size, seed,
                                                 self._workers, self._passes), self._device)

    def __call__(self) -> FeatureBatch:
        return next(self._batches)


class StepRows:
    """Tensors with a row for each step of an epoch, on a device; a counter there selects the next.

    Reading a row therefore runs the same operations on the same memory at every step and never
    waits for the host, as a recorded step needs (`partialhn.training.steps`).
    """

    def __init__(self, device: torch.device) -> None:
        self._rows: tuple[Tensor, ...] = ()
        self._steps_2 = torch.zeros(2, dtype=torch.int64, device=device)
        self._step_1, self.steps_1 = torch.split(self._steps_2, 1)
        """Steps of the epoch, and of all epochs; one operation counts both."""

    def begin(self, rows: Sequence[Tensor]) -> None:
        """Copies an epoch's rows to the device, into the memory of the epoch before."""
        if self._rows:
            for mine, theirs in zip(self._rows, rows, strict=True):
                mine.copy_(theirs)
        else:
            self._rows = tuple(tensor.to(self._steps_2.device) for tensor in rows)
        self._step_1.zero_()

    def next(self) -> list[Tensor]:
        """The next row of each tensor."""
        assert self._rows, "begin comes first"
        # index_select with the counter on the device: rows[step] would need the step on the host
        row = [tensor.index_select(0, self._step_1)[0] for tensor in self._rows]
        self._steps_2 += 1
        return row


class ResidentBatches(Batches):
    """Batches of features that lie in one tensor on the device, selected there (`StepRows`).

    What selects a batch is one tensor, so that it takes one operation to read: rows, views counted
    through all rows, and labels.
    """

    def __init__(self, features: FeatureSet, batch_size: int, workers: Workers,
                 passes: int = 1, *, as_stored: bool = False) -> None:
        """as_stored: whether features without scales keep their stored number type."""
        super().__init__(features, batch_size, workers, passes)
        self._rows, self._as_stored = StepRows(features.y_N.device), as_stored
        self.steps_1 = self._rows.steps_1
        self._y_N = features.y_N.cpu()
        self._loss_scale = 1.0
        self._seed: tuple[int, ...] = ()
        self._batches_read = 0

    def begin(self, seed: Sequence[int]) -> None:
        order = epoch_order(self._features, self._batch_size, seed, self._workers, self._passes)
        index_EB = order.rows_EB * self._features.views + order.views_EB
        self._rows.begin([torch.stack([index_EB, order.rows_EB, self._y_N[order.rows_EB]], 1)])
        self._loss_scale = order.loss_scale
        self._seed, self._batches_read = tuple(seed), 0

    def __call__(self) -> FeatureBatch:
        index_B, rows_B, y_B = self._rows.next()[0].unbind()
        seed = (*self._seed, self._batches_read)
        self._batches_read += 1
        z_BCHW = self._features.gather_one(index_B, rows_B, as_stored=self._as_stored)
        return FeatureBatch(z_BCHW, y_B, self._loss_scale, seed)


AnyBatch = TypeVar("AnyBatch", bound=tuple[Any, ...])


def prefetched(batches: Iterator[AnyBatch], device: torch.device,
               ahead: int = 2) -> Iterator[AnyBatch]:
    """The same batches on the device, read by a thread at most `ahead` batches before their use."""
    waiting: queue.Queue[AnyBatch | BaseException | None] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: AnyBatch | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for batch in batches:
                put(on_device(batch, device))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again where the batches are used
            put(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


def on_device(batch: AnyBatch, device: torch.device) -> AnyBatch:
    """A named tuple whose tensors lie on the device."""
    return type(batch)(*(value.to(device) if isinstance(value, Tensor) else value
                         for value in batch))
