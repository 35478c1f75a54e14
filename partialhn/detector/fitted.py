"""The detector's classifier, solved from its statistics: ridge regression over all classes.

Targets are one for an image's class and zero for the others, every class counts alike, and the
penalty is the shrinkage of the covariance within classes: with this covariance W, shrunk, and class
means m (P, D) around their centre, the weights are (W + m^T m / P)^-1 m. Generalised
cross-validation (Golub, Heath and Wahba 1979) chooses the shrinkage: it predicts the squared error
on new images from the sums alone. The smallest shrinkage is taken whose error is within `TOLERANCE`
of the least, because more classes are right with it. The kept samples choose what the sums cannot
say: how sharp the probabilities are, and how strange a known image is.

Legend: B images, S sampled images of all tasks, M classes of all tasks, P of them that have images,
D expanded features, T of them that are the trunk's own means and spreads, R directions in which the
features vary.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from partialhn.detector.statistics import FEW, UNIT

SHRINKAGES = tuple(10.0 ** (power / 4) for power in range(-12, 9))
"""Isotropic parts of the covariance that are tried, in units of its mean eigenvalue."""
TOLERANCE = 0.02
"""Share by which the squared error may exceed the least (`docs/measurements/task-inference.md`)."""
LEAST_FREEDOM = 0.05
"""Share of its freedom that a fit must leave for its predicted error to count: a fit that leaves
less reproduces its images, and rounding in the sums decides what is left."""
LEAST_SHARP, SHARPEST = 1e-3, 100.0
"""Smallest and largest factor on the scores."""
PRECISION, STEPS = 1e-6, 20
"""Precision of the factor, as a share of it, and most steps in which it is looked for."""
PIECES = 6
"""Pieces in which the triangle of the whitening map is multiplied: 7 of 12 parts of the work."""
SPARE = 16
"""Random vectors beyond the rank of a matrix whose columns they span."""
OWN_SHRINKAGE = 0.01
"""Isotropic part of the covariance of the trunk's own means and spreads."""


class Usual(NamedTuple):
    """Mean and standard deviation of a number over the sampled images."""

    mean: float
    spread: float

    @staticmethod
    def of(value_S: Tensor) -> "Usual":
        """`UNKNOWN` where there are too few samples to say."""
        if len(value_S) < FEW:
            return UNKNOWN
        return Usual(value_S.mean().item(), max(value_S.std().item(), 1e-6))

    def deviation(self, value_B: Tensor) -> Tensor:
        """Values in standard deviations from the mean."""
        return (value_B - self.mean) / self.spread


UNKNOWN = Usual(0.0, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Density:
    """How usual the trunk's own means and spreads of an image are: one Gaussian a class, with one
    covariance for all (Lee et al. 2018, arXiv 1807.03888).
    """

    whiten_TT: Tensor
    mean_PT: Tensor
    """Whitened class means."""

    def distance(self, h_BD: Tensor) -> Tensor:
        """Logarithm of the squared distance to the nearest class mean, (B,)."""
        width = len(self.whiten_TT)
        white_BT = h_BD[:, :width] @ self.whiten_TT
        nearer_BP = white_BT @ self.mean_PT.T - self.mean_PT.square().sum(1) / 2
        square_B = white_BT.square().sum(1) - 2 * nearer_BP.amax(1)
        return square_B.clamp_min(1e-6).log()


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A solved classifier of features, seen from the mean of the class means."""

    centre_D: Tensor
    whitening: tuple[Tensor, ...]
    """The map to coordinates in which the shrunk covariance within classes is the identity, an
    upper triangle: pieces of its columns, without the rows of zeros below them."""
    toward_PD: Tensor
    """The map to the whitened coordinates' parts along each whitened class mean."""
    weight_MD: Tensor
    """Weights of the features for the score of each class; not a number for a class without
    images."""
    sharpness: float
    """Factor on the classes' scores."""
    shrinkage: float
    density: Density
    angles: Usual = UNKNOWN
    distances: Usual = UNKNOWN

    def log_probabilities(self, h_BD: Tensor) -> Tensor:
        """Log-probabilities of all classes (B, M)."""
        score_BM = ((h_BD - self.centre_D) @ self.weight_MD.T).nan_to_num(nan=-torch.inf)
        return (self.sharpness * score_BM).log_softmax(1)

    def strangeness(self, h_BD: Tensor, head_B: Tensor | None = None) -> Tensor:
        """How little an image resembles any class, (B,): larger is stranger.

        All of its parts are in standard deviations of known images. The first is the largest cosine
        between the image and a class mean, whitened and seen from the mean of all. Its mean with
        head_B, how strange the image is to the head that answers, tells near strangers best; where
        head_B is not a number, the cosine stands alone. The last part is the trunk's own density,
        which tells noise, blur and drawings; it counts from one deviation on, because it says
        nothing about near strangers.
        """
        near_B = self.angles.deviation(self._angle(h_BD))
        if head_B is not None:
            near_B = torch.where(head_B.isnan(), near_B, (near_B + head_B) / 2)
        return near_B + (self.distances.deviation(self.density.distance(h_BD)) - 1).clamp_min(0)

    def measured(self, h_SD: Tensor) -> "Fitted":
        """The same, with what is usual for the sampled images h_SD."""
        return dataclasses.replace(self, angles=Usual.of(self._angle(h_SD)),
                                   distances=Usual.of(self.density.distance(h_SD)))

    def _angle(self, h_BD: Tensor) -> Tensor:
        """Minus the largest cosine between an image and a class mean, (B,)."""
        around_BD = h_BD - self.centre_D
        white_BD = torch.cat([around_BD[:, :len(piece)] @ piece for piece in self.whitening], 1)
        length_B: Tensor = torch.linalg.vector_norm(white_BD, dim=1)
        return -(around_BD @ self.toward_PD.T).amax(1) / length_B.clamp_min(1e-12)

    def single(self) -> "Fitted":
        """The same in float32, for answers."""
        density = Density(self.density.whiten_TT.float(), self.density.mean_PT.float())
        return dataclasses.replace(self, centre_D=self.centre_D.float(),
                                   whitening=tuple(piece.float() for piece in self.whitening),
                                   toward_PD=self.toward_PD.float(),
                                   weight_MD=self.weight_MD.float(), density=density)


def fit(scatter_DD: Tensor, images: int, mean_MD: Tensor, sample_SD: Tensor,
        sample_y_S: Tensor, own: int) -> Fitted:
    """Solves the classifier, all in float64.

    scatter_DD: the sum over `images` images of (h - class mean)(h - class mean)^T. mean_MD: class
    means; not a number for a class without images, which is then never the answer. sample_y_S:
    classes of the sampled images, among the M. own: how many of the D features are the trunk's own
    means and spreads, T; they are the first ones.
    """
    images = max(1, images)
    covariance_DD, present_M = scatter_DD / images, ~mean_MD.isnan().any(1)
    centre_D = mean_MD[present_M].mean(0)
    around_PD, known_S = mean_MD[present_M] - centre_D, present_M[sample_y_S]
    sampled_SD, sampled_y_S = sample_SD[known_S], sample_y_S[known_S]
    shrinkage, penalty, weight_PD = _ridge(covariance_DD, around_PD, images)
    weight_MD = torch.full_like(mean_MD, torch.nan)
    weight_MD[present_M] = weight_PD
    sharp = 1.0
    if len(sampled_SD) >= FEW and len(around_PD) > 1:
        column_M = present_M.long().cumsum(0) - 1  # absent classes have none
        sharp = sharpness((sampled_SD - centre_D) @ weight_PD.T, column_M[sampled_y_S])
    whiten_DD = _whitening(covariance_DD, penalty)
    unit_PD = torch.nn.functional.normalize(around_PD @ whiten_DD, dim=1)
    own_TT = covariance_DD[:own, :own]
    whiten_TT = _whitening(own_TT, _penalty(own_TT, OWN_SHRINKAGE, images))
    density = Density(whiten_TT, mean_MD[present_M, :own] @ whiten_TT)
    return Fitted(centre_D, _pieces(whiten_DD), unit_PD @ whiten_DD.T, weight_MD, sharp, shrinkage,
                  density).measured(sampled_SD)


def _ridge(covariance_DD: Tensor, around_PD: Tensor,
           images: int) -> tuple[float, float, Tensor]:
    """The shrinkage that generalised cross-validation chooses, the penalty that it is, and the
    weights (P, D). around_PD: class means, around their mean.
    """
    classes = len(around_PD)
    values_R, vectors_DR = spectrum(covariance_DD + around_PD.T @ around_PD / classes, images)
    turned_PR = around_PD @ vectors_DR
    signal_R = turned_PR.square().sum(0) / classes

    def error(shrinkage: float) -> float:  # squared, of all targets together
        shrunk_R = values_R + _penalty(covariance_DD, shrinkage, images)
        residual = classes - 1 - (signal_R * (2 - values_R / shrunk_R) / shrunk_R).sum()
        freedom = 1 - (1 + (values_R / shrunk_R).sum()) / images
        return float(residual.clamp_min(0) / freedom**2) if freedom >= LEAST_FREEDOM else math.inf

    errors = [error(shrinkage) for shrinkage in SHRINKAGES]
    best, least = SHRINKAGES[-1], min(errors)
    if classes > 1 and least < math.inf:  # else there are too few images to say
        best = next(shrinkage for shrinkage, own in zip(SHRINKAGES, errors, strict=True)
                    if own <= (1 + TOLERANCE) * least)
    penalty = _penalty(covariance_DD, best, images)
    return best, penalty, turned_PR / (values_R + penalty) @ vectors_DR.T


def spectrum(matrix_DD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (R,) and eigenvectors (D, R) of a symmetric matrix without negative eigenvalues,
    of this rank at most, but for rounding.

    Where the rank is small, the matrix times a few random vectors more than the rank spans all of
    its columns (Halko, Martinsson and Tropp 2011), and the rest is an eigenproblem of that size:
    0.2 s in place of 3.1 s for 2,400 features of 150 images.
    """
    if 2 * (rank + SPARE) < len(matrix_DD):
        draws = np.random.RandomState(0).standard_normal((len(matrix_DD), rank + SPARE))
        basis_DR, _ = torch.linalg.qr(matrix_DD @ torch.from_numpy(draws).to(matrix_DD))
        values_R, inner_RR = torch.linalg.eigh(basis_DR.T @ matrix_DD @ basis_DR)
        return values_R.clamp_min(0), basis_DR @ inner_RR
    values_D, vectors_DD = torch.linalg.eigh(matrix_DD)
    return values_D.clamp_min(0), vectors_DD


def _penalty(covariance_DD: Tensor, shrinkage: float, images: int) -> float:
    """The isotropic part that is added; at least as large as the eigenvalues below zero that the
    rounding of the sums can bring about.
    """
    rounding = UNIT * math.sqrt(len(covariance_DD) / images)
    return max(shrinkage * float(covariance_DD.diagonal().mean()), rounding)


def _whitening(covariance_DD: Tensor, penalty: float) -> Tensor:
    """W (D, D) so that x @ W has the covariance I where x has the given one, plus penalty * I."""
    one_DD = torch.eye(len(covariance_DD), dtype=covariance_DD.dtype)
    lower_DD = torch.linalg.cholesky(covariance_DD + penalty * one_DD)
    inverse_DD: Tensor = torch.linalg.solve_triangular(lower_DD, one_DD, upper=False)
    return inverse_DD.T.contiguous()


def _pieces(upper_DD: Tensor) -> tuple[Tensor, ...]:
    """`Fitted.whitening` from an upper triangle, copied so that the zeros take no memory."""
    ends = [len(upper_DD) * place // PIECES for place in range(PIECES + 1)]
    return tuple(upper_DD[:end, start:end].clone() for start, end in itertools.pairwise(ends))


def sharpness(score_SM: Tensor, y_S: Tensor) -> float:
    """The factor on scores, 0.001 to 100, whose softmax gives the labels the smallest
    cross-entropy.
    """
    own = score_SM.gather(1, y_S[:, None]).mean()

    def slope(place: float) -> tuple[float, float]:  # of the cross-entropy, and its derivative
        factor = math.exp(place)
        p_SM = (score_SM * factor).softmax(1)
        mean_S = p_SM.mul_(score_SM).sum(1)
        square_S = p_SM.mul_(score_SM).sum(1)
        return float(mean_S.mean() - own), factor * float((square_S - mean_S.square()).mean())

    low, high = math.log(LEAST_SHARP), math.log(SHARPEST)
    place = high
    # The cross-entropy is convex in the factor, so its slope has one zero; Newton's steps find it,
    # and a step that leaves the interval in which it must lie is replaced by the middle.
    for _ in range(STEPS):
        height, rise = slope(place)
        low, high = (place, high) if height < 0 else (low, place)
        before, place = place, place - height / rise if rise > 0 else math.inf
        if not low < place < high:
            place = (low + high) / 2
        if abs(place - before) <= PRECISION:
            break
    return min(math.exp(place), SHARPEST)
