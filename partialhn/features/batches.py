"""Batches of a task's features, in an order that is a function of a seed.

Legend: N images, E steps of an epoch, B batch, C channels, H W spatial.
"""

import abc
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.features.feature_set import FeatureSet


class FeatureBatch(NamedTuple):
    """Frozen-trunk features of one batch, all of one task.

    z_BCHW: float32 features. y_B: int64 labels, 0 to K-1 within the task. loss_scale: the factor
    that makes the mean over workers of their local means the mean over the global batch; 1 when
    every worker holds equally many rows. seed: seeds whatever is drawn at this step, and is the
    same for every worker.
    """

    z_BCHW: Tensor
    y_B: Tensor
    loss_scale: float
    seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Workers:
    """Who shares the work: this worker's place, and how gradients and sums become common."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    add: Callable[[Tensor], Tensor] = lambda total: total


class Order(NamedTuple):
    """What one worker reads in an epoch: rows_EB and the view of each, views_EB, int64.

    loss_scale: the factor of a batch (`FeatureBatch.loss_scale`).
    """

    rows_EB: Tensor
    views_EB: Tensor
    loss_scale: float


def whole_batch(features: FeatureSet, batch_size: int, workers: Workers) -> int:
    """Rows of a batch over all workers: a small task is one batch. Raises: InputError for fewer
    images than workers.
    """
    if len(features) < workers.world:
        raise InputError(f"a task has {len(features)} training images for {workers.world} workers; "
                         "allowed: at least one each")
    return min(batch_size, len(features))


def epoch_order(features: FeatureSet, batch_size: int, seed: Sequence[int],
                workers: Workers) -> Order:
    """An order that depends on `seed` alone; each worker gets its share of every batch.

    The images that do not fill a last batch wait for another epoch's order. Raises: InputError
    for fewer images than workers.
    """
    size = whole_batch(features, batch_size, workers)
    rng = np.random.default_rng(list(seed))
    order_N = rng.permutation(len(features))
    views_N = rng.integers(0, features.views, len(features))
    steps = len(order_N) // size
    rows_EB, views_EB = (
        torch.from_numpy(np.ascontiguousarray(
            x_N[:steps * size].reshape(steps, size)[:, workers.rank::workers.world]))
        for x_N in (order_N, views_N))
    return Order(rows_EB, views_EB, workers.world * rows_EB.shape[1] / size)


def epoch_batches(features: FeatureSet, batch_size: int, seed: Sequence[int],
                  workers: Workers) -> Iterator[FeatureBatch]:
    """The batches of `epoch_order`, each read when it is asked for."""
    order = epoch_order(features, batch_size, seed, workers)
    rows_EB, views_EB = (x_EB.to(features.y_N.device) for x_EB in order[:2])
    for step, (rows_B, views_B) in enumerate(zip(rows_EB, views_EB, strict=True)):
        yield FeatureBatch(features.gather(rows_B, views_B), features.y_N[rows_B], order.loss_scale,
                           (*seed, step))


class Batches(abc.ABC):
    """Where steps read: `begin` an epoch, then ask for one batch after the other."""

    def __init__(self, features: FeatureSet, batch_size: int, workers: Workers) -> None:
        self._features, self._batch_size, self._workers = features, batch_size, workers
        size = whole_batch(features, batch_size, workers)
        self.steps = len(features) // size
        """Batches E of an epoch."""
        self.batch = len(range(workers.rank, size, workers.world))
        """Rows B of this worker's share of a batch."""

    @abc.abstractmethod
    def begin(self, seed: Sequence[int]) -> None:
        """The next batch is the first of the epoch that belongs to `seed`."""

    @abc.abstractmethod
    def __call__(self) -> FeatureBatch:
        """The next batch."""


class MappedBatches(Batches):
    """Batches of features that are larger than memory: a thread reads ahead of the steps."""

    def __init__(self, features: FeatureSet, batch_size: int, workers: Workers,
                 device: torch.device) -> None:
        super().__init__(features, batch_size, workers)
        self._device = device
        self._batches: Iterator[FeatureBatch] = iter(())

    def begin(self, seed: Sequence[int]) -> None:
        self._batches = prefetched(epoch_batches(self._features, self._batch_size, seed,
                                                 self._workers), self._device)

    def __call__(self) -> FeatureBatch:
        return next(self._batches)


class ResidentBatches(Batches):
    """Batches of features that are one tensor on the device, where a counter says which is next.

    So reading a batch is the same operations on the same memory at every step, and no step asks
    the host for anything (`partialhn.training.steps`).
    """

    def __init__(self, features: FeatureSet, batch_size: int, workers: Workers) -> None:
        super().__init__(features, batch_size, workers)
        self._order: Order | None = None
        self._place_1 = torch.zeros(1, dtype=torch.int64, device=features.y_N.device)
        self._seed: tuple[int, ...] = ()
        self._read = 0

    def begin(self, seed: Sequence[int]) -> None:
        """Puts the epoch's order on the device, over the one before."""
        order = epoch_order(self._features, self._batch_size, seed, self._workers)
        if self._order is None:
            device = self._place_1.device
            self._order = order._replace(rows_EB=order.rows_EB.to(device),
                                         views_EB=order.views_EB.to(device))
        else:
            self._order.rows_EB.copy_(order.rows_EB)
            self._order.views_EB.copy_(order.views_EB)
        self._place_1.zero_()
        self._seed, self._read = tuple(seed), 0

    def __call__(self) -> FeatureBatch:
        assert self._order is not None, "begin comes first"
        rows_B, views_B = (x_EB.index_select(0, self._place_1)[0] for x_EB in self._order[:2])
        self._place_1 += 1
        seed = (*self._seed, self._read)
        self._read += 1
        return FeatureBatch(self._features.gather(rows_B, views_B),
                            self._features.y_N.index_select(0, rows_B),
                            self._order.loss_scale, seed)


def prefetched(batches: Iterator[FeatureBatch], device: torch.device,
               ahead: int = 2) -> Iterator[FeatureBatch]:
    """The same batches on the device, read by a thread that is at most `ahead` of their user."""
    waiting: queue.Queue[FeatureBatch | BaseException | None] = queue.Queue(ahead)
    stop = threading.Event()

    def put(item: FeatureBatch | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for batch in batches:
                put(batch._replace(z_BCHW=batch.z_BCHW.to(device), y_B=batch.y_B.to(device)))
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
