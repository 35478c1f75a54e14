"""How deep may the trunk be frozen? A forecast from the first two tasks, before any training.

The trunk was trained on the first task. A stage that became special to it serves other tasks
worse than it serves the first: a linear probe (ridge regression in closed form) on the stage's
features then loses accuracy on the second task against the first. What is left of it, above
chance, is what the forecast says a depth keeps. Linear CKA with the labels tells the same story
without a probe, and is reported beside it.

Legend: N images, D numbers of an image, K classes, C channels, H W spatial.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from partialhn.features.feature_set import FeatureSet

PENALTIES = tuple(10.0 ** power for power in range(-4, 3))
"""Ridge penalties tried, in units of the number of images."""
WORTH = 0.75
"""Depths that keep as much of the best depth's forecast are worth trying: on Tiny-ImageNet the one
that keeps less (0.72, all frozen but the classifier) lost 4 of 43 points, the next (0.80) two."""
POOLED_SIDE = 2
VARIANCE = 0.9
MAX_IMAGES = 4000


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """One task's features at one depth."""

    train: FeatureSet
    held_out: FeatureSet
    classes: int


@dataclasses.dataclass(frozen=True)
class StageForecast:
    """What the first two tasks say about freezing through one stage."""

    depth: int
    probe_first: float
    """Accuracy of a linear probe on the first task's held-out images."""
    probe_second: float
    cka_first: float
    """Linear CKA of features and labels on the first task's held-out images."""
    cka_second: float
    kept: float
    """The second task's probe accuracy above chance as a share of the first's."""
    worth_trying: bool


def forecast(tasks: Mapping[int, tuple[ProbeTask, ProbeTask]]) -> list[StageForecast]:
    """A forecast for each depth, from the features of the first two tasks at that depth."""
    found = []
    for depth in sorted(tasks):
        probes, ckas, above = [], [], []
        for task in tasks[depth]:
            x_train_ND, x_held_ND = pooled(task.train), pooled(task.held_out)
            y_train_N, y_held_N = (each.y_N[:MAX_IMAGES] for each in (task.train, task.held_out))
            accuracy = probe_accuracy(x_train_ND, y_train_N, x_held_ND, y_held_N, task.classes)
            probes.append(accuracy)
            ckas.append(linear_cka(x_held_ND, one_hot(y_held_N, task.classes)))
            above.append(max(accuracy - 1 / task.classes, 0.0) / (1 - 1 / task.classes))
        kept = above[1] / above[0] if above[0] > 0 else 0.0
        found.append(StageForecast(depth, probes[0], probes[1], ckas[0], ckas[1], kept,
                                   worth_trying=False))
    best = max(stage.kept for stage in found)
    return [dataclasses.replace(stage, worth_trying=stage.kept >= WORTH * best)
            for stage in found]


def pooled(features: FeatureSet) -> Tensor:
    """x_ND of the plain view: each channel's mean over quarters of the image (over all of it
    where it has a single pixel), of at most `MAX_IMAGES` images.
    """
    rows_N = torch.arange(min(len(features), MAX_IMAGES))
    parts = []
    for rows_B in torch.split(rows_N, 256):
        z_BCHW = features.gather(rows_B, torch.zeros_like(rows_B))
        side = min(POOLED_SIDE, *z_BCHW.shape[2:])
        parts.append(torch.nn.functional.adaptive_avg_pool2d(z_BCHW, side).flatten(1))
    return torch.cat(parts)


def one_hot(y_N: Tensor, classes: int) -> Tensor:
    """(N, K) float labels."""
    return torch.nn.functional.one_hot(y_N, classes).float()


def probe_accuracy(x_train_ND: Tensor, y_train_N: Tensor, x_test_ND: Tensor, y_test_N: Tensor,
                   classes: int) -> float:
    """Test accuracy of ridge regression on one-hot labels.

    The penalty is the one with the smallest leave-one-out error on the training images, in closed
    form: residual / (1 - leverage).
    """
    mean_D, std_D = x_train_ND.mean(0), x_train_ND.std(0).clamp_min(1e-6)
    x_ND, test_ND = (((x - mean_D) / std_D).double() for x in (x_train_ND, x_test_ND))
    target_NK = one_hot(y_train_N, classes).double()
    offset_K = target_NK.mean(0)
    centred_NK = target_NK - offset_K
    values_D, vectors_DD = torch.linalg.eigh(x_ND.T @ x_ND)
    rotated_ND = x_ND @ vectors_DD
    moved_DK = rotated_ND.T @ centred_NK
    best, weights_DK = float("inf"), moved_DK
    for penalty in PENALTIES:
        shrink_D = 1 / (values_D.clamp_min(0) + penalty * len(x_ND))
        leverage_N = 1 / len(x_ND) + (rotated_ND**2 * shrink_D).sum(1)
        residual_NK = centred_NK - rotated_ND @ (shrink_D[:, None] * moved_DK)
        error = ((residual_NK / (1 - leverage_N[:, None]).clamp_min(1e-6))**2).mean().item()
        if error < best:
            best, weights_DK = error, vectors_DD @ (shrink_D[:, None] * moved_DK)
    predicted_N = (test_ND @ weights_DK + offset_K).argmax(1)
    return float((predicted_N == y_test_N).double().mean())


def linear_cka(x_ND: Tensor, y_NK: Tensor) -> float:
    """Linear centred kernel alignment, 0 to 1 (Kornblith et al. 2019, equation 3)."""
    x_ND, y_NK = ((each - each.mean(0)).double() for each in (x_ND, y_NK))
    cross = ((y_NK.T @ x_ND)**2).sum()
    norms = (x_ND.T @ x_ND).norm() * (y_NK.T @ y_NK).norm()
    return float(cross / norms) if norms > 0 else 0.0


def task_shift(first_ND: Tensor, other_ND: Tensor) -> float:
    """How a task differs from the first: the share of its features' spread, about the first
    task's mean, that lies outside the directions which hold 90 % of the first task's own.
    """
    mean_D = first_ND.mean(0)
    own_ND, new_ND = (first_ND - mean_D).double(), (other_ND - mean_D).double()
    values_D, vectors_DD = torch.linalg.eigh(own_ND.T @ own_ND)
    share_D = values_D.clamp_min(0).flip(0).cumsum(0) / values_D.clamp_min(0).sum()
    count = int((share_D < VARIANCE).sum()) + 1
    inside_D = ((new_ND @ vectors_DD.flip(1)[:, :count])**2).sum()
    return float(1 - inside_D / (new_ND**2).sum())
