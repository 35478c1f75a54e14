"""What the detector keeps of one task, computed from the task's stored features in one pass.

The scatter matrix is rounded to multiples of 2^-16 and kept as whole numbers. Sums of whole numbers
are exact: tasks give the same bits in any order, and a task that is taken out leaves no trace.

Legend: N images, S sampled images, K classes of the task, D expanded features, P = D (D + 1) / 2.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from partialhn.detector.expansion import Expansion
from partialhn.features.closed_form import sharpness
from partialhn.features.feature_set import FeatureSet

UNIT = 2.0**-16
"""Resolution of the scatter matrix."""
SAMPLE = 12
"""Held-out images of each task that are kept, expanded, to calibrate the detector."""
BATCH = 256
FEW = 8
"""Fewer images than this say nothing about what is usual."""
NO_ENERGY = torch.full((2,), torch.nan)
"""The energy of a head about which nothing is known."""


class TaskStatistics(NamedTuple):
    """Statistics of one task's features."""

    expansion: Tensor
    """The numbers of the expansion that was used (`Expansion.tensor`)."""
    mean_KD: Tensor
    """Mean of each class, float16; not a number for a class without images."""
    scatter_P: Tensor
    """Lower triangle of the sum over images of (h - class mean)(h - class mean)^T, in units of
    2^-16, int64."""
    images: Tensor
    """Number of images in the scatter matrix, and of training images in all: int64, (2,)."""
    sample_SD: Tensor
    """Expanded features of some images that are in no sum, float16."""
    sample_y_S: Tensor
    """Classes of these images within the task, int64."""
    sample_head_SK: Tensor
    """Sharpened logits of these images by the task's own head, float32 (log-probabilities in models
    without `energy`); no rows where no image was held out, because the head has learned from these
    images itself."""
    sharpness: Tensor
    """Factor on the head's logits that gives its probabilities, a float32 scalar; 1 where no image
    was held out."""
    energy: Tensor = NO_ENERGY
    """Mean and standard deviation, over all held-out images, of the logarithm of the sum of the
    exponentials of the head's sharpened logits (energy, Liu et al. 2020, arXiv 2010.03759):
    float32, (2,). Not a number where too few images were held out."""


def statistics(expansion: Expansion, train: FeatureSet, held_out: FeatureSet | None, classes: int,
               logits_NK: Tensor | None = None) -> TaskStatistics:
    """The statistics of a task, from the plain view of its images.

    held_out: images that are in no sum; without any, some training images are left out of the sums.
    logits_NK: what a head that has not learned from the held-out images gives for all of them; None
    leaves the head out of the calibration.
    """
    count = len(train)
    validated = held_out is not None and len(held_out) > 0
    sample = held_out if held_out is not None and validated else train
    rows_S = spread_over(len(sample), SAMPLE) if validated else _left_out(count)
    rows_N = _summed(count, validated)
    mean_KD, scatter_DD = _moments(expansion, train, rows_N, classes)
    h_SD, y_S = expanded(expansion, sample, rows_S)
    head_SK, factor, energy_2 = torch.empty(0, classes), 1.0, NO_ENERGY
    if validated and logits_NK is not None:
        factor = sharpness(logits_NK.double(), sample.y_N.cpu())
        energy_N = (factor * logits_NK).logsumexp(1)
        head_SK = factor * logits_NK[rows_S]
        if len(energy_N) >= FEW:
            energy_2 = torch.stack([energy_N.mean(), energy_N.std().clamp_min(1e-6)])
    return TaskStatistics(expansion.tensor(), mean_KD.half(), packed(scatter_DD),
                          torch.tensor([len(rows_N), count]), h_SD.half(), y_S, head_SK,
                          torch.tensor(factor), energy_2)


def scatter_again(expansion: Expansion, train: FeatureSet, images_2: Tensor,
                  classes: int) -> Tensor:
    """The scatter matrix `scatter_P` of a slot once more, to take it off the sum.

    images_2: `images` of the slot. Its images are the first ones of `train`.
    """
    summed, count = images_2.tolist()
    rows_N = _summed(count, validated=summed == count)
    return packed(_moments(expansion, train, rows_N, classes)[1])


def expanded(expansion: Expansion, features: FeatureSet, rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """Expanded features h_ND, float32, and labels y_N of the plain view of some rows."""
    h_ND = [expansion(_plain(features, rows_B)) for rows_B in torch.split(rows_N, BATCH)]
    return (torch.cat(h_ND) if h_ND else torch.empty(0, expansion.width),
            features.y_N.cpu()[rows_N])


def spread_over(length: int, count: int) -> Tensor:
    """`count` evenly spaced positions of a sequence; all of them if it has no more."""
    count = min(count, length)
    return (torch.arange(count) * length + length // 2) // max(1, count)


def _left_out(count: int) -> Tensor:
    """Training images that are left out of the sums where no others are held out."""
    return spread_over(count, min(SAMPLE, count // 8))


def _summed(count: int, validated: bool) -> Tensor:
    """Training images that are in the sums."""
    rows_N = torch.arange(count)
    return rows_N if validated else rows_N[~torch.isin(rows_N, _left_out(count))]


def packed(scatter_DD: Tensor) -> Tensor:
    """The lower triangle of a symmetric float64 matrix in units of 2^-16, int64."""
    return (scatter_DD[_lower(len(scatter_DD))] / UNIT).round().long()


def unpacked(scatter_P: Tensor, width: int) -> Tensor:
    """The symmetric float64 matrix that `packed` was given."""
    lower_DD = torch.zeros(width, width, dtype=torch.float64)
    lower_DD[_lower(width)] = scatter_P.double() * UNIT
    return lower_DD + lower_DD.tril(-1).T


def _moments(expansion: Expansion, features: FeatureSet, rows_N: Tensor,
             classes: int) -> tuple[Tensor, Tensor]:
    """Class means and the scatter matrix around them, float64, a batch at a time."""
    width = expansion.width
    sum_KD, gram_DD = (torch.zeros(size, width, dtype=torch.float64) for size in (classes, width))
    count_K = torch.zeros(classes, dtype=torch.float64)
    for rows_B in torch.split(rows_N, BATCH):
        h_BD, y_B = expanded(expansion, features, rows_B)
        h_BD = h_BD.double()
        sum_KD.index_add_(0, y_B, h_BD)
        count_K += torch.bincount(y_B, minlength=classes)
        gram_DD.addmm_(h_BD.T, h_BD)
    mean_KD = sum_KD / count_K[:, None]  # not a number for a class without images
    filled_KD = mean_KD.nan_to_num()
    return mean_KD, gram_DD - (filled_KD.T * count_K) @ filled_KD


def _plain(features: FeatureSet, rows_B: Tensor) -> Tensor:
    rows_B = rows_B.to(features.y_N.device)
    return features.gather(rows_B, torch.zeros_like(rows_B))


def _lower(width: int) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool).tril()
