"""The linear probe: what a linear classifier alone makes of the frozen trunk's features.

Ridge regression to one column a class, in closed form, on features pooled to a few cells. A task
that is learned worse than this has learned nothing above the trunk.

Legend: N images, C channels, F pooled features, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from partialhn.features.feature_set import FeatureSet

MAX_FEATURES = 1024
"""Numbers of one image after pooling, so that the closed form stays quick."""
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridge penalties, as shares of the mean eigenvalue; the best on held-out rows is taken."""
HELD_OUT = 5
"""Every fifth training row chooses the penalty."""


def linear_probe(train: FeatureSet, test: FeatureSet, classes: int) -> float:
    """Accuracy, 0 to 1, on the test features. The same features give the same number."""
    z_NF, y_N = _pooled(train), train.y_N.cpu()
    held_N = torch.arange(len(y_N)) % HELD_OUT == 0
    if not 0 < int(held_N.sum()) < len(y_N):
        held_N = torch.zeros(len(y_N), dtype=torch.bool)
    mean_F, scale_F = z_NF.mean(0), z_NF.std(0, correction=0).clamp_min(1e-6)
    z_NF = (z_NF - mean_F) / scale_F
    chosen = PENALTIES[len(PENALTIES) // 2]
    if held_N.any():
        fits = _ridge(z_NF[~held_N], y_N[~held_N], classes)
        chosen = max(PENALTIES, key=lambda p: _share(z_NF[held_N] @ fits(p)[0] + fits(p)[1],
                                                     y_N[held_N]))
    weight_FK, bias_K = _ridge(z_NF, y_N, classes)(chosen)
    test_NF = (_pooled(test) - mean_F) / scale_F
    return _share(test_NF @ weight_FK + bias_K, test.y_N.cpu())


def _ridge(z_NF: Tensor, y_N: Tensor,
           classes: int) -> Callable[[float], tuple[Tensor, Tensor]]:
    """Solutions for any penalty from one eigendecomposition."""
    target_NK = torch.nn.functional.one_hot(y_N, classes).double()
    mean_F, bias_K = z_NF.mean(0), target_NK.mean(0)
    centred_NF = z_NF - mean_F
    values_F, vectors_FF = torch.linalg.eigh(centred_NF.T @ centred_NF)
    right_FK = vectors_FF.T @ (centred_NF.T @ (target_NK - bias_K))

    def solve(penalty: float) -> tuple[Tensor, Tensor]:
        strength = penalty * values_F.mean().clamp_min(1e-12)
        weight_FK = vectors_FF @ (right_FK / (values_F.clamp_min(0) + strength)[:, None])
        return weight_FK, bias_K - mean_F @ weight_FK

    return solve


def _pooled(features: FeatureSet) -> Tensor:
    """(N, F) of the first, plain view, averaged over as many cells as MAX_FEATURES allows."""
    parts = []
    for rows_B in torch.split(torch.arange(len(features), device=features.y_N.device), 1024):
        z_NCHW = features.gather(rows_B, torch.zeros_like(rows_B)).cpu()
        channels, height, width = z_NCHW.shape[1:]
        side = next((s for s in range(min(height, width, 32), 0, -1)
                     if channels * s * s <= MAX_FEATURES), 1)
        pooled = torch.nn.functional.adaptive_avg_pool2d(z_NCHW, side)
        parts.append(pooled.flatten(1).double())
    return torch.cat(parts)


def _share(logits_NK: Tensor, y_N: Tensor) -> float:
    return float((logits_NK.argmax(1) == y_N).double().mean())
