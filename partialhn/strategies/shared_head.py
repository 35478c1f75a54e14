"""One head that all tasks share and go on changing; a task owns its classifier alone.

The base of the baselines that differ in how they protect what earlier tasks need.
"""

from typing import cast

from torch import Tensor, nn

from partialhn.config import Config
from partialhn.networks.head import Head, HeadStart, HeadWeights
from partialhn.strategies.base import Classifier, Strategy


class SharedHead(Strategy):
    """A shared head, learned task after task from the weights that the task before left."""

    statistics: Tensor | None

    def __init__(self, head: Head, start: HeadStart, config: Config) -> None:
        super().__init__(head, start, config)
        self.convolutions = nn.ParameterList(value.clone() for value in start.matrices)
        self.norm = nn.Parameter(start.norm.clone())
        self.register_buffer("statistics", head.first_statistics())

    def new_task(self, classes: int, refreshes: int | None) -> Classifier:
        del refreshes  # everything but the classifier is shared anyway
        return Classifier(classes, self.head)

    def weights(self, task: int) -> HeadWeights:
        own = cast(Classifier, self.tasks[task])
        return HeadWeights(self.head.named(self.convolutions), self.norm, own.classifier_KF,
                           own.bias_K, self.statistics)
