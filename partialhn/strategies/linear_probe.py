"""The simplest strategy: a linear classifier for each task on the trunk's pooled features.

It is trained by the same loop as every other strategy, on features that batch norm standardises.
The norm is folded when the task is done, so a learned task is linear.
`ridge` solves the same classifier in closed form (`partialhn.strategies.closed_form`).
"""

from typing import cast

import torch

from partialhn.config import Config
from partialhn.networks.head import Head, HeadStart, HeadWeights
from partialhn.strategies.base import OwnNorm, Strategy


class LinearProbe(Strategy):
    """One linear classifier for each task, and nothing else above the trunk."""

    def __init__(self, head: Head, start: HeadStart, config: Config) -> None:
        super().__init__(head.without_stages(), start, config)

    def new_task(self, classes: int, refreshes: int | None) -> OwnNorm:
        del refreshes  # `add_task` carries the classifier over
        width = self.head.width
        return OwnNorm(classes, self.head, torch.cat([torch.ones(width), torch.zeros(width)]))

    def weights(self, task: int) -> HeadWeights:
        return cast(OwnNorm, self.tasks[task]).weights({})
