"""Ridge regression on the features of a task's head, before and after the head is trained.

Before, it is what the classifier starts from, where the head is the network's own. After, the
trained classifier is averaged with it.

A head and its classifier are trained together by gradient steps, and the steps of a small task end
before the classifier fits its features. Ridge regression fits it at once, but knows squared errors
only. Both are linear in the features of the task's own head, so the sum of their logits is one
classifier more: the task stores and computes nothing new. Measured in
`docs/measurements/few-images.md`.

Legend: N images, F features that the classifier sees, K classes.
"""

from typing import cast

import torch
from torch import Tensor

from partialhn.detector.statistics import spread_over
from partialhn.features.closed_form import fit_ridge, sharpness
from partialhn.features.feature_set import FeatureSet
from partialhn.strategies import Strategy
from partialhn.strategies.base import Classifier
from partialhn.training.answers import embedded

MOST_IMAGES = 16_384
"""Training images, spread over all, that ridge regression sees at most."""


def start_at_ridge(strategy: Strategy, task_index: int, train: FeatureSet) -> None:
    """Lets the classifier of a task that is about to be trained start as ridge regression on the
    features of its head: with a random one, the first steps would distort them (Kumar et al. 2022).
    """
    x_NF, y_N = embedded(strategy, task_index, train, spread_over(len(train), MOST_IMAGES))
    ridge = fit_ridge(x_NF, y_N, strategy.classes[task_index]).sharpened(y_N)
    cast(Classifier, strategy.tasks[task_index]).set_classifier(ridge.weight_KF, ridge.bias_K)


def average_with_ridge(strategy: Strategy, task_index: int, train: FeatureSet,
                       held_out: FeatureSet) -> None:
    """Replaces the classifier of a trained task by the mean of it and ridge regression.

    Each is scaled first, so that its probabilities fit the held-out images best; the mean is scaled
    in the same way.
    """
    own = cast(Classifier, strategy.tasks[task_index])
    x_NF, y_N = embedded(strategy, task_index, train, spread_over(len(train), MOST_IMAGES))
    ridge = fit_ridge(x_NF, y_N, strategy.classes[task_index])
    x_NF, y_N = embedded(strategy, task_index, held_out)
    x_NF = torch.cat([x_NF, torch.ones(len(x_NF), 1)], 1).double()  # with the bias as a feature

    def scaled(weight_KF: Tensor) -> Tensor:
        return sharpness(x_NF @ weight_KF.T, y_N) * weight_KF

    trained_KF = torch.cat([own.classifier_KF, own.bias_K[:, None]], 1).detach().cpu().double()
    solved_KF = torch.cat([ridge.weight_KF, ridge.bias_K[:, None]], 1)
    mean_KF = scaled(scaled(trained_KF) + scaled(solved_KF))
    own.set_classifier(mean_KF[:, :-1], mean_KF[:, -1])
