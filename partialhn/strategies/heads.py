"""The generated heads of many tasks, of which only the last used ones are kept in memory."""

import collections
import threading
from collections.abc import Sequence
from typing import overload

from torch import Tensor

from partialhn.networks.head import HeadWeights
from partialhn.strategies.base import Strategy

KEPT_BYTES = 256 << 20
"""Bytes of generated weights that are kept; one head is, whatever its size."""


class Heads(Sequence[HeadWeights]):
    """The head weights of some tasks, in their order; each is generated when it is asked for.

    A head of a slim ResNet-18 takes 4 MB of memory and its columns 12 kB, so the heads of a
    thousand tasks would fill a small machine.
    """

    def __init__(self, strategy: Strategy, tasks: Sequence[int],
                 kept_bytes: int = KEPT_BYTES) -> None:
        self._strategy, self._tasks, self._kept_bytes = strategy, tuple(tasks), kept_bytes
        self._kept: collections.OrderedDict[int, HeadWeights] = collections.OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, place: int) -> HeadWeights: ...

    @overload
    def __getitem__(self, place: slice) -> "Heads": ...

    def __getitem__(self, place: int | slice) -> "HeadWeights | Heads":
        if isinstance(place, slice):
            return Heads(self._strategy, self._tasks[place], self._kept_bytes)
        return self.of_task(self._tasks[place])

    def of_task(self, task: int) -> HeadWeights:
        """The head weights of a task, whether it is one of the sequence or not."""
        with self._lock:  # several threads of a server may ask
            weights = self._kept.pop(task, None)
            if weights is None:
                weights = self._strategy.weights(task)
                self._bytes += _size(weights)
            self._kept[task] = weights
            while self._bytes > self._kept_bytes and len(self._kept) > 1:
                self._bytes -= _size(self._kept.popitem(last=False)[1])
            return weights


def _size(weights: HeadWeights) -> int:
    return sum(value.nbytes for field in weights
               for value in (field.values() if isinstance(field, dict) else [field])
               if isinstance(value, Tensor))
