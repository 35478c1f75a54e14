"""Linear classifiers in closed form on pooled features: ridge regression and nearest class mean.

Both are fitted to the first, plain view of a task's training images alone. Leave-one-out
predictions, which follow in closed form too, choose the ridge penalty and the sharpness of the
probabilities, so nothing is held out and nothing is drawn at random.

Legend: N images, B images at once, C channels, H W spatial, F pooled features, R directions in
which the features vary, K classes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from partialhn.features.feature_set import FeatureSet

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-8, 5))
"""Ridge penalties tried, in units of the number of images: 1e-4 to 100."""
BATCH = 1024
SHRUNK = 0.3
"""Share of the mean variance of all features that is added to the variance of each
(`docs/measurements/few-images.md`)."""
NO_DIRECTION = 1e-12
"""A direction that holds a smaller share than this of the largest variance is rounding."""
SHARPEST = 1e4
"""Largest factor on logits, relative to their spread."""


class LinearClassifier(NamedTuple):
    """A classifier of pooled features: logits_NK = x_NF @ weight_KF.T + bias_K, in float64.

    left_out_NK: logits of every training image by the classifier of all the others.
    """

    weight_KF: Tensor
    bias_K: Tensor
    left_out_NK: Tensor

    def logits(self, x_NF: Tensor) -> Tensor:
        """logits_NK of float64 features."""
        return x_NF @ self.weight_KF.T + self.bias_K

    def sharpened(self, y_N: Tensor) -> "LinearClassifier":
        """The same answers, with logits whose softmax gives probabilities.

        One factor scales all logits: the one with the smallest cross-entropy of the leave-one-out
        logits. As in Platt (1999), the target of an image is not 1 but (n + 1) / (n + 2), with n
        images a class, so that a classifier without an error is not infinitely sure.
        """
        factor = sharpness(self.left_out_NK, y_N)
        return LinearClassifier(*(factor * value for value in self))


class Ridge:
    """Ridge regression on one-hot labels, for any penalty, from one eigendecomposition."""

    def __init__(self, x_NF: Tensor, y_N: Tensor, classes: int) -> None:
        """x_NF: float64, with mean 0 over the images. y_N: class indices."""
        target_NK = one_hot(y_N, classes).double()
        self.bias_K = target_NK.mean(0)
        self._centred_NK = target_NK - self.bias_K
        # x = left * sqrt(values) * right.T, from the smaller of the two products of x with itself
        wide = x_NF.shape[1] > len(x_NF)
        values_R, vectors = torch.linalg.eigh(x_NF @ x_NF.T if wide else x_NF.T @ x_NF)
        kept = values_R > NO_DIRECTION * values_R[-1].clamp_min(1e-300)
        self._values_R, vectors = values_R[kept], vectors[:, kept]
        other = (x_NF.T if wide else x_NF) @ vectors / self._values_R.sqrt()
        self._left_NR, self._right_FR = (vectors, other) if wide else (other, vectors)
        self._target_RK = self._left_NR.T @ self._centred_NK

    def weight(self, strength: float | Tensor) -> Tensor:
        """The weights (F, K) of penalty `strength` * |weights|^2; predictions add `bias_K`."""
        shrink_R = self._values_R.sqrt() / (self._values_R + strength)
        weight_FK: Tensor = self._right_FR @ (shrink_R[:, None] * self._target_RK)
        return weight_FK

    def left_out(self, strength: float) -> Tensor:
        """(N, K) predictions of every image from all the others."""
        # Closed form: the residual of the fit to all images, divided by 1 - leverage. Of each
        # direction both hold the share that the penalty leaves. With few images and a small
        # penalty that is little, and 1 minus the rest of it would be rounding.
        left_R, count = strength / (self._values_R + strength), len(self._left_NR)
        outside_NK = self._centred_NK - self._left_NR @ self._target_RK
        residual_NK = outside_NK + self._left_NR @ (left_R[:, None] * self._target_RK)
        square_NR = self._left_NR**2
        free_N = (1 - 1 / count - square_NR.sum(1)).clamp_min(0) + (square_NR * left_R).sum(1)
        error_NK = residual_NK / free_N.clamp_min(1e-12)[:, None]
        left_out_NK: Tensor = self._centred_NK + self.bias_K - error_NK
        return left_out_NK

    def leave_one_out(self, strength: float) -> float:
        """Mean squared error of every image predicted from all the others."""
        error_NK = self._centred_NK + self.bias_K - self.left_out(strength)
        return float((error_NK**2).mean())


def fit_ridge(x_NF: Tensor, y_N: Tensor, classes: int,
              importance_F: Tensor | None = None) -> LinearClassifier:
    """Ridge regression on scaled features, with the penalty of the smallest leave-one-out squared
    error.

    Features are divided by their standard deviation, as far as it can be known: a feature that is
    nearly zero for these few images may well not be so for others, so `SHRUNK` of the mean variance
    is added to each variance.

    importance_F: factors on the scaled features; those with a larger one are penalised less.
    """
    x_NF = x_NF.double()
    mean_F, variance_F = x_NF.mean(0), x_NF.var(0, correction=0)
    scale_F = (variance_F + SHRUNK * variance_F.mean()).sqrt().clamp_min(1e-6)
    if importance_F is not None:
        scale_F = scale_F / importance_F
    ridge = Ridge((x_NF - mean_F) / scale_F, y_N, classes)
    strength = min((penalty * len(x_NF) for penalty in PENALTIES), key=ridge.leave_one_out)
    weight_KF = (ridge.weight(strength) / scale_F[:, None]).T
    return LinearClassifier(weight_KF, ridge.bias_K - weight_KF @ mean_F, ridge.left_out(strength))


def fit_class_means(x_NF: Tensor, y_N: Tensor, classes: int) -> LinearClassifier:
    """Nearest class mean: the logit of a class falls with the squared distance to its mean.

    An image's own squared norm is the same for all classes, so it is left out and the classifier
    is linear. A class without images gets the mean of all.
    """
    x_NF, member_NK = x_NF.double(), one_hot(y_N, classes).double()
    centre_F, count_K = x_NF.mean(0), member_NK.sum(0)
    around_NF = x_NF - centre_F
    mean_KF = member_NK.T @ around_NF / count_K.clamp_min(1)[:, None]
    distance_NK = torch.cdist(around_NF, mean_KF)**2
    # Without the image itself, its class mean lies n / (n - 1) times as far from it.
    further_K = torch.where(count_K > 1, count_K / (count_K - 1).clamp_min(1), 1.0)**2
    left_out_NK = -distance_NK * torch.where(member_NK > 0, further_K, 1.0)
    weight_KF = 2 * mean_KF
    bias_K = -(mean_KF**2).sum(1) - weight_KF @ centre_F
    return LinearClassifier(weight_KF, bias_K, left_out_NK)


def sharpness(logits_NK: Tensor, y_N: Tensor) -> float:
    """The factor on the logits that gives `LinearClassifier.sharpened` its probabilities."""
    classes = logits_NK.shape[1]
    spread = float((logits_NK - logits_NK.mean(1, keepdim=True)).std(correction=0))
    if classes < 2 or spread < 1e-12:
        return 1.0
    sure = (len(y_N) / classes + 1) / (len(y_N) / classes + 2)
    target_NK = one_hot(y_N, classes).double()
    target_NK = sure * target_NK + (1 - sure) * (1 - target_NK) / (classes - 1)
    wanted = (target_NK * logits_NK).sum(1)

    def slope(factor: float) -> float:  # of the cross-entropy, which is convex in the factor
        return float(((factor * logits_NK).softmax(1) * logits_NK).sum(1).sub(wanted).mean())

    low, high = 1e-3 / spread, SHARPEST / spread
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return math.sqrt(low * high)


def pooled_cells(features: FeatureSet, side: int, images: int | None = None) -> Tensor:
    """(N, C * side * side) of the first, plain view of the first `images` images (default: all):
    each channel's average over each of side x side cells.
    """
    rows_N = torch.arange(len(features) if images is None else min(len(features), images))
    parts = []
    for rows_B in torch.split(rows_N.to(features.y_N.device), BATCH):
        z_BCHW = features.gather(rows_B, torch.zeros_like(rows_B)).cpu()
        parts.append(torch.nn.functional.adaptive_avg_pool2d(z_BCHW, side).flatten(1))
    return torch.cat(parts)


def one_hot(y_N: Tensor, classes: int) -> Tensor:
    """(N, K) float labels."""
    return torch.nn.functional.one_hot(y_N, classes).float()


def accuracy(logits_NK: Tensor, y_N: Tensor) -> float:
    """Share of images whose largest logit is that of their class."""
    return float((logits_NK.argmax(1) == y_N).double().mean())
