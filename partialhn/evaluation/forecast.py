"""A forecast of how deep the trunk may be frozen, from the first two tasks, before any training.

A linear probe (ridge regression in closed form) on the features of each depth is measured on both.
Where the trunk was trained on the first task, a stage that is specific to that task makes the
probe less accurate on the second: the forecast of a depth is the second task's accuracy above
chance as a share of the first's. A trunk that was trained elsewhere prefers neither task. There it
is the mean accuracy above chance as a share of the best at this depth or at a shallower one: what
is lost by freezing more. What a head gains above a shallow cut no probe can tell. A probe that only
guesses where it is compared with, and a task of one class, say nothing about a depth.
Linear CKA with the labels measures the same without a probe, and is reported beside it.

Legend: N images, D numbers of an image, K classes, C channels, H W spatial.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from partialhn.features.closed_form import accuracy, fit_ridge, one_hot, pooled_cells
from partialhn.features.feature_set import FeatureSet

WORTH = 0.75
"""Depths with at least this share of the best depth's forecast are worth trying. On Tiny-ImageNet
the depth with 0.72 (all frozen but the classifier) lost 4 of 43 points, the next (0.80) lost 2."""
POOLED_SIDE = 2
"""Cells along each side of a feature map after pooling."""
VARIANCE = 0.9
"""Share of the first task's variance that its main directions must hold."""
MAX_IMAGES = 4000
"""Most images of a task that a forecast reads."""


@dataclasses.dataclass(frozen=True)
class ProbeTask:
    """One task's features at one depth."""

    train: FeatureSet
    held_out: FeatureSet
    classes: int


@dataclasses.dataclass(frozen=True)
class StageForecast:
    """The forecast for freezing through one stage, from the first two tasks."""

    depth: int
    probe_first: float
    """Accuracy of a linear probe on the first task's held-out images."""
    probe_second: float
    cka_first: float
    """Linear CKA of features and labels on the first task's held-out images."""
    cka_second: float
    kept: float | None
    """The share of the probe's accuracy above chance that remains at this depth; None where the
    probe that it is a share of is no better than guessing."""
    worth_trying: bool
    """Also where `kept` is not known, or says that nothing is lost."""
    expected: float | None
    """A number that is larger for the depths where more accuracy is expected: `kept`, or for a
    trunk that was trained elsewhere the probe's accuracy above chance."""


def forecast(tasks: Mapping[int, tuple[ProbeTask, ProbeTask]], *, trained_here: bool = True
             ) -> list[StageForecast]:
    """A forecast for each depth, from the features of the first two tasks at that depth.

    trained_here: whether the trunk was trained on the first task.
    """
    stages, most = [], 0.0
    for depth in sorted(tasks):
        probes, ckas, above = [], [], []
        for task in tasks[depth]:
            x_train_ND, x_held_ND = pooled(task.train), pooled(task.held_out)
            y_train_N, y_held_N = (each.y_N[:MAX_IMAGES] for each in (task.train, task.held_out))
            probe = probe_accuracy(x_train_ND, y_train_N, x_held_ND, y_held_N, task.classes)
            probes.append(probe)
            ckas.append(linear_cka(x_held_ND, one_hot(y_held_N, task.classes)))
            if task.classes > 1:  # of one class every guess is right
                above.append(max(probe - 1 / task.classes, 0.0) / (1 - 1 / task.classes))
        mean = sum(above) / len(above) if above else 0.0
        most = max(most, mean)
        remains, whole = mean, most
        if trained_here:
            remains, whole = (above[1], above[0]) if len(above) == 2 else (0.0, 0.0)
        kept = remains / whole if whole > 0 else None
        stages.append(StageForecast(depth, probes[0], probes[1], ckas[0], ckas[1], kept,
                                    worth_trying=False, expected=kept if trained_here else mean))
    best = max((stage.kept for stage in stages if stage.kept is not None), default=0.0)
    enough = WORTH * min(best, 1.0)  # more than 1 remains where the second task is the easier one
    return [dataclasses.replace(stage, worth_trying=stage.kept is None or stage.kept >= enough)
            for stage in stages]


def pooled(features: FeatureSet) -> Tensor:
    """x_ND of the plain view: each channel's average over quarters of the image (over all of it
    where it has a single pixel), of at most `MAX_IMAGES` images.
    """
    side = min(POOLED_SIDE, *features.manifest.shape_VCHW[2:])
    return pooled_cells(features, side, MAX_IMAGES)


def probe_accuracy(x_train_ND: Tensor, y_train_N: Tensor, x_test_ND: Tensor, y_test_N: Tensor,
                   classes: int) -> float:
    """Test accuracy of ridge regression on one-hot labels."""
    classifier = fit_ridge(x_train_ND, y_train_N, classes)
    return accuracy(classifier.logits(x_test_ND.double()), y_test_N)


def linear_cka(x_ND: Tensor, y_NK: Tensor) -> float:
    """Linear centred kernel alignment, 0 to 1 (Kornblith et al. 2019, equation 3)."""
    x_ND, y_NK = ((each - each.mean(0)).double() for each in (x_ND, y_NK))
    cross = ((y_NK.T @ x_ND)**2).sum()
    norms = (x_ND.T @ x_ND).norm() * (y_NK.T @ y_NK).norm()
    return float(cross / norms) if norms > 0 else 0.0


def task_shift(first_ND: Tensor, other_ND: Tensor) -> float:
    """How a task differs from the first: the share of the variance of its features, around the
    first task's mean, outside of the directions that hold 90 % of the first task's variance.
    """
    # The eigenvectors of the first task's scatter are its directions, the largest last.
    mean_D = first_ND.mean(0)
    own_ND, new_ND = (first_ND - mean_D).double(), (other_ND - mean_D).double()
    values_D, vectors_DD = torch.linalg.eigh(own_ND.T @ own_ND)
    share_D = values_D.clamp_min(0).flip(0).cumsum(0) / values_D.clamp_min(0).sum()
    count = int((share_D < VARIANCE).sum()) + 1
    inside_D = ((new_ND @ vectors_DD.flip(1)[:, :count])**2).sum()
    return float(1 - inside_D / (new_ND**2).sum())
