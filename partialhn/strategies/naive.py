"""The lower bound: one shared head, fine-tuned on task after task, that nothing protects.

Each task keeps its classifier; convolutions and normalisation are shared and move on.
"""

from typing import cast

import torch
from torch import nn

from partialhn.model import Head, HeadWeights
from partialhn.strategies.base import Classifier, Strategy, fresh_convolutions, named


class Naive(Strategy):
    """Fine-tuning without protection: the forgetting everything else is measured against."""

    def __init__(self, head: Head, seed: int) -> None:
        super().__init__(head, seed)
        self._names = [tensor.name for tensor in head.convolutions]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.convolutions = nn.ParameterList(fresh_convolutions(head))
        self.norm = nn.Parameter(head.first_norm())

    def new_task(self, classes: int) -> Classifier:
        return Classifier(classes, self.head.width)

    def weights(self, task: int) -> HeadWeights:
        own = cast(Classifier, self.tasks[task])
        return HeadWeights(named(self._names, list(self.convolutions)), self.norm,
                           own.classifier_KF, own.bias_K)
