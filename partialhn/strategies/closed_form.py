"""Classifiers that need no training: ridge regression and nearest class mean, one a task.

Both are linear in the trunk's features, pooled over the whole image, and are computed in closed
form from the task's training images, without a gradient step. Users of a pretrained trunk try them
first. A factor on the logits, chosen by leave-one-out, makes softmax give probabilities
(`partialhn.features.closed_form`).

Legend: N images, F pooled features, K classes.
"""

from collections.abc import Collection
from typing import cast

import torch
from torch import Tensor

from partialhn.config import Config
from partialhn.features.closed_form import (
    LinearClassifier,
    fit_class_means,
    fit_ridge,
    pooled_cells,
)
from partialhn.features.feature_set import FeatureSet
from partialhn.networks.head import Head, HeadStart, HeadWeights
from partialhn.strategies.base import Classifier, Strategy, renumbered


class ClosedForm(Strategy):
    """One linear classifier for each task, which `solve` computes."""

    closed_form = True
    identity_norm: Tensor

    def __init__(self, head: Head, start: HeadStart, config: Config) -> None:
        super().__init__(head.without_stages(), start, config)
        width = self.head.width
        self.register_buffer("identity_norm", torch.cat([torch.ones(width), torch.zeros(width)]),
                             persistent=False)

    @property
    def independent(self) -> bool:
        return True

    def new_task(self, classes: int, refreshes: int | None) -> Classifier:
        del refreshes  # `solve` needs no start
        return Classifier(classes, self.head)

    def state_without(self, tasks: Collection[int]) -> dict[str, Tensor]:
        kept = (task for task in range(len(self.tasks)) if task not in tasks)
        return renumbered(self.state_dict(), "tasks.", {old: new for new, old in enumerate(kept)})

    def weights(self, task: int) -> HeadWeights:
        own = cast(Classifier, self.tasks[task])
        return HeadWeights({}, self.identity_norm, own.classifier_KF, own.bias_K)

    def solve(self, task: int, features: FeatureSet) -> None:
        y_N = features.y_N.cpu()
        fitted = self.fit(pooled_cells(features, 1).double(), y_N, self.classes[task])
        fitted = fitted.sharpened(y_N)
        cast(Classifier, self.tasks[task]).set_classifier(fitted.weight_KF, fitted.bias_K)

    def fit(self, x_NF: Tensor, y_N: Tensor, classes: int) -> LinearClassifier:
        """The classifier of pooled features x_NF with labels y_N."""
        raise NotImplementedError


class RidgeHeads(ClosedForm):
    """Ridge regression on one-hot labels; leave-one-out chooses the penalty of each task."""

    def fit(self, x_NF: Tensor, y_N: Tensor, classes: int) -> LinearClassifier:
        return fit_ridge(x_NF, y_N, classes)


class NearestClassMean(ClosedForm):
    """The class whose mean feature is nearest (Mensink et al. 2013)."""

    def fit(self, x_NF: Tensor, y_N: Tensor, classes: int) -> LinearClassifier:
        return fit_class_means(x_NF, y_N, classes)
