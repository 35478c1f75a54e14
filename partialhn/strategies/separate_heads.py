"""The plain alternative: a whole head for each task on the same frozen trunk.

It forgets nothing and stores a whole head for every task.
"""

from collections.abc import Collection
from typing import cast

from torch import Tensor, nn

from partialhn.networks.head import Head, HeadStart, HeadWeights
from partialhn.strategies.base import OwnNorm, Strategy, renumbered


class PlainHead(OwnNorm):
    """The weights of one whole head."""

    def __init__(self, classes: int, head: Head, start: HeadStart) -> None:
        super().__init__(classes, head, start.norm)
        self.convolutions = nn.ParameterList(value.clone() for value in start.matrices)


class SeparateHeads(Strategy):
    """The baseline without sharing: every task trains a head of its own from the same start."""

    @property
    def independent(self) -> bool:
        return True

    def new_task(self, classes: int, refreshes: int | None) -> PlainHead:
        own = PlainHead(classes, self.head, self.start)
        if refreshes is not None:
            own.convolutions.load_state_dict(
                cast(PlainHead, self.tasks[refreshes]).convolutions.state_dict())
        return own

    def state_without(self, tasks: Collection[int]) -> dict[str, Tensor]:
        kept = (task for task in range(len(self.tasks)) if task not in tasks)
        return renumbered(self.state_dict(), "tasks.", {old: new for new, old in enumerate(kept)})

    def weights(self, task: int) -> HeadWeights:
        own = cast(PlainHead, self.tasks[task])
        return own.weights(self.head.named(own.convolutions))
