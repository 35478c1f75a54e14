"""Linear probes: the accuracy of a linear classifier on the frozen trunk's features.

A probe is ridge regression on one-hot labels, in closed form, on features pooled to a few cells. A
task whose head is less accurate than a probe has learned nothing above the trunk.

`Ridge` is the solver. The gate of retraining chooses the penalty on held-out rows (`linear_probe`);
the forecast chooses it by leave-one-out error (`partialhn.evaluation.forecast`).

Legend: N images, B images at once, C channels, H W spatial, F pooled features, K classes.
"""

import torch
from torch import Tensor

from partialhn.features.feature_set import FeatureSet

MAX_FEATURES = 1024
"""Most pooled features of an image, so that the closed form stays fast."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties tried, in units of the mean eigenvalue."""
HELD_OUT = 5
"""Every fifth training row is held out to choose the penalty."""
BATCH = 1024


class Ridge:
    """Ridge regression on one-hot labels, for any penalty, from one eigendecomposition.

    values_F, vectors_FF: eigenvalues and eigenvectors of the features' scatter matrix.
    """

    def __init__(self, x_NF: Tensor, y_N: Tensor, classes: int) -> None:
        """x_NF: float64, with mean 0 over the images. y_N: class indices."""
        target_NK = one_hot(y_N, classes).double()
        self.bias_K = target_NK.mean(0)
        self.values_F: Tensor
        self.vectors_FF: Tensor
        self.values_F, self.vectors_FF = torch.linalg.eigh(x_NF.T @ x_NF)
        self._x_NF, self._centred_NK = x_NF, target_NK - self.bias_K
        self._right_FK = self.vectors_FF.T @ (x_NF.T @ self._centred_NK)

    def weight(self, strength: float | Tensor) -> Tensor:
        """The weights (F, K) of penalty `strength` * |weights|^2; predictions add `bias_K`."""
        shrink_F = 1 / (self.values_F.clamp_min(0) + strength)
        return self.vectors_FF @ (shrink_F[:, None] * self._right_FK)

    def leave_one_out(self, strength: float) -> float:
        """Mean squared error of every image predicted from all the others."""
        # Closed form: the residual of the fit to all images, divided by 1 - leverage.
        shrink_F = 1 / (self.values_F.clamp_min(0) + strength)
        rotated_NF = self._x_NF @ self.vectors_FF
        leverage_N = 1 / len(self._x_NF) + (rotated_NF**2 * shrink_F).sum(1)
        residual_NK = self._centred_NK - rotated_NF @ (shrink_F[:, None] * self._right_FK)
        error_NK = residual_NK / (1 - leverage_N[:, None]).clamp_min(1e-6)
        return float((error_NK**2).mean())


def linear_probe(train: FeatureSet, test: FeatureSet, classes: int) -> float:
    """Accuracy, 0 to 1, on the test features. The same features give the same number."""
    z_NF, y_N = pooled(train), train.y_N.cpu()
    held_N = torch.arange(len(y_N)) % HELD_OUT == 0
    if not 0 < int(held_N.sum()) < len(y_N):
        held_N = torch.zeros(len(y_N), dtype=torch.bool)
    mean_F, scale_F = z_NF.mean(0), z_NF.std(0, correction=0).clamp_min(1e-6)
    z_NF = (z_NF - mean_F) / scale_F
    chosen = PENALTIES[len(PENALTIES) // 2]
    if held_N.any():
        fit = _Fit(z_NF[~held_N], y_N[~held_N], classes)
        chosen = max(PENALTIES, key=lambda penalty: fit.accuracy(penalty, z_NF[held_N],
                                                                 y_N[held_N]))
    test_NF = (pooled(test) - mean_F) / scale_F
    return _Fit(z_NF, y_N, classes).accuracy(chosen, test_NF, test.y_N.cpu())


class _Fit:
    """`Ridge` on features of any mean, with the penalty in units of the mean eigenvalue."""

    def __init__(self, z_NF: Tensor, y_N: Tensor, classes: int) -> None:
        self._mean_F = z_NF.mean(0)
        self._ridge = Ridge(z_NF - self._mean_F, y_N, classes)

    def accuracy(self, penalty: float, z_NF: Tensor, y_N: Tensor) -> float:
        weight_FK = self._ridge.weight(penalty * self._ridge.values_F.mean().clamp_min(1e-12))
        bias_K = self._ridge.bias_K - self._mean_F @ weight_FK
        return accuracy(z_NF @ weight_FK + bias_K, y_N)


def pooled(features: FeatureSet) -> Tensor:
    """(N, F) float64 of the first, plain view: averages of as many cells as `MAX_FEATURES`
    allows.
    """
    channels, height, width = features.manifest.shape_VCHW[1:]
    side = next((s for s in range(min(height, width, 32), 0, -1)
                 if channels * s * s <= MAX_FEATURES), 1)
    return pooled_cells(features, side).double()


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
