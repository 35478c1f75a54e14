"""The number of workers or trials that run at once on each node, from its CPUs, GPUs and memory."""

import dataclasses
import math
from collections.abc import Sequence

from partialhn.errors import InputError
from partialhn.numbers import size


@dataclasses.dataclass(frozen=True)
class Room:
    """The resources of a node, or the needs of a worker or a trial."""

    cpus: float
    gpus: float
    memory: float
    """Bytes."""

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU", f"{self.gpus:g} GPU" if self.gpus else "",
                 size(self.memory)]
        return ", ".join(part for part in parts if part)


@dataclasses.dataclass(frozen=True)
class Packing:
    """Trials that fit at the same time."""

    need: Room
    per_node: tuple[int, ...]
    """Trials that fit on each node."""
    limit: int | None
    """Most trials that the user allows; None: no limit."""

    @property
    def at_once(self) -> int:
        """Trials that run at the same time."""
        return min(sum(self.per_node), self.limit or sum(self.per_node))

    def __str__(self) -> str:
        nodes = " + ".join(map(str, self.per_node))
        limit = f", limited to {self.limit}" if self.limit and self.limit < sum(
            self.per_node) else ""
        return (f"{self.at_once} at once (nodes have room for {nodes}{limit}), each with "
                f"{self.need}")


def pack(need: Room, nodes: Sequence[Room], limit: int | None = None) -> Packing:
    """The number of trials with these needs that the nodes hold at once.

    Raises: InputError with the arithmetic where not even one fits on any node.
    """
    per_node = tuple(_together(need, node) for node in nodes)
    if not any(per_node):
        raise InputError(f"a trial needs {need}, and no node has that ({described(nodes)}); "
                         "allowed: fewer cpus_per_trial or gpus_per_trial, or shallower stored "
                         "features (other depths, fewer views) where memory is short")
    return Packing(need, per_node, limit)


def workers_that_fit(need: Room, nodes: Sequence[Room]) -> int:
    """Number of workers with these needs that the nodes hold at once."""
    return sum(_together(need, node) for node in nodes)


def described(nodes: Sequence[Room]) -> str:
    """What each node has, in words."""
    return "; ".join(f"node {index + 1}: {node}" for index, node in enumerate(nodes))


def _together(need: Room, node: Room) -> int:
    return min(_times(node.cpus, need.cpus), _shares(node.gpus, need.gpus),
               _times(node.memory, need.memory))


def _shares(have: float, need: float) -> int:
    """How often a share of a GPU fits: two halves of different GPUs are not one whole."""
    return math.floor(have) * _times(1, need) if 0 < need <= 1 else _times(have, need)


def _times(have: float, need: float) -> int:
    """How often a need fits; a need of 0 fits any number of times."""
    return math.floor(have / need + 1e-9) if need > 0 else 1_000_000
