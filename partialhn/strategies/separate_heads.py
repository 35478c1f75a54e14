"""The user's honest alternative: one plain head for each task on the same frozen trunk.

Forgets nothing and stores a whole head for every task.
"""

from typing import cast

from torch import nn

from partialhn.model import Head, HeadWeights
from partialhn.strategies.base import Classifier, Strategy, fresh_convolutions, named


class PlainHead(Classifier):
    """All weights of one head."""

    def __init__(self, classes: int, head: Head) -> None:
        super().__init__(classes, head.width)
        self.convolutions = nn.ParameterList(fresh_convolutions(head))
        self.norm = nn.Parameter(head.first_norm())


class SeparateHeads(Strategy):
    """Upper bound without sharing: task t trains a head of its own from scratch."""

    def __init__(self, head: Head, seed: int) -> None:
        super().__init__(head, seed)
        self._names = [tensor.name for tensor in head.convolutions]

    def new_task(self, classes: int) -> PlainHead:
        return PlainHead(classes, self.head)

    def weights(self, task: int) -> HeadWeights:
        own = cast(PlainHead, self.tasks[task])
        return HeadWeights(named(self._names, list(own.convolutions)), own.norm,
                           own.classifier_KF, own.bias_K)
