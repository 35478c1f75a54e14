"""The least a trunk allows: a linear classifier for each task on its pooled features.

Trained by the same loop as every other strategy, on features that batch norm standardises; folded
when the task is done, so what remains is linear. `partialhn.evaluation.linear_probe` has the closed
form that the gate uses.
"""

from typing import cast

import torch

from partialhn.networks.head import Head, HeadStart, HeadWeights
from partialhn.strategies.base import OwnNorm, Strategy


class LinearProbe(Strategy):
    """A linear classifier a task and nothing else above the trunk."""

    def __init__(self, head: Head, start: HeadStart, seed: int) -> None:
        super().__init__(head.without_stages(), start, seed)

    def new_task(self, classes: int, refreshes: int | None) -> OwnNorm:
        del refreshes  # `add_task` carries the classifier over
        width = self.head.width
        return OwnNorm(classes, self.head, torch.cat([torch.ones(width), torch.zeros(width)]))

    def weights(self, task: int) -> HeadWeights:
        return cast(OwnNorm, self.tasks[task]).weights({})
