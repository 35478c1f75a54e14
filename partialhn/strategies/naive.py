"""The lower baseline: one shared head, fine-tuned on task after task, that nothing protects.

Each task keeps its classifier; convolutions and normalisation are shared and move on.
"""

from typing import cast

from torch import Tensor, nn

from partialhn.networks.head import Head, HeadStart, HeadWeights
from partialhn.strategies.base import Classifier, Strategy


class Naive(Strategy):
    """Fine-tuning without protection: the forgetting everything else is measured against."""

    statistics: Tensor | None

    def __init__(self, head: Head, start: HeadStart, seed: int) -> None:
        super().__init__(head, start, seed)
        self.convolutions = nn.ParameterList(value.clone() for value in start.convolutions)
        self.norm = nn.Parameter(start.norm.clone())
        self.register_buffer("statistics", head.first_statistics())

    def new_task(self, classes: int, refreshes: int | None) -> Classifier:
        del refreshes  # everything but the classifier is shared anyway
        return Classifier(classes, self.head)

    def weights(self, task: int) -> HeadWeights:
        own = cast(Classifier, self.tasks[task])
        return HeadWeights(self.head.named(self.convolutions), self.norm, own.classifier_KF,
                           own.bias_K, self.statistics)
