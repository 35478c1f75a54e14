"""The detector's classifier, solved from its statistics: ridge regression over all classes.

Targets are one for an image's class and zero for the others, every class counts alike, and the
penalty is the shrinkage of the covariance within classes. In coordinates that this covariance
whitens, with class means m (M, D), the weights are (I + m m^T / M)^-1 m. The kept samples choose
what the sums cannot say: the shrinkage, and the sharpness of the probabilities.

Legend: B images, S sampled images of all tasks, M classes of all tasks, P of them that have images,
D expanded features, T of them that are the trunk's own means and spreads.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

SHRINKAGES = tuple(10.0 ** (power / 2) for power in range(-6, 3))
"""Isotropic parts of the covariance that are tried, in units of its mean eigenvalue."""
SHARPEST = 100.0
"""Largest factor on the scores."""
FEW = 8
"""Fewer samples than this choose nothing: the middle of `SHRINKAGES` is taken."""
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
    """A solved classifier, in whitened coordinates: their origin is the mean of the class means."""

    centre_D: Tensor
    whiten_DD: Tensor
    unit_PD: Tensor
    """Whitened class means, of length 1."""
    weight_MD: Tensor
    """Weights of whitened features for the score of each class; not a number for a class without
    images."""
    sharpness: float
    """Factor on the classes' scores."""
    shrinkage: float
    density: Density
    angles: Usual = UNKNOWN
    distances: Usual = UNKNOWN

    def white(self, h_BD: Tensor) -> Tensor:
        """Whitened features."""
        return (h_BD - self.centre_D) @ self.whiten_DD

    def log_probabilities(self, white_BD: Tensor) -> Tensor:
        """Log-probabilities of all classes (B, M), from whitened features."""
        score_BM = (white_BD @ self.weight_MD.T).nan_to_num(nan=-torch.inf)
        return (self.sharpness * score_BM).log_softmax(1)

    def strangeness(self, h_BD: Tensor, white_BD: Tensor) -> Tensor:
        """How little an image resembles any class, (B,): larger is stranger. white_BD: of h_BD.

        Both of its parts are in standard deviations of the sampled images. The first is the largest
        cosine between the image and a class mean, seen from the mean of all: it tells near
        strangers best. The second is the trunk's own density, which tells noise, blur and drawings;
        it counts from one deviation on, because it says nothing about near strangers.
        """
        angle_B = self.angles.deviation(self._angle(white_BD))
        return angle_B + (self.distances.deviation(self.density.distance(h_BD)) - 1).clamp_min(0)

    def measured(self, h_SD: Tensor) -> "Fitted":
        """The same, with what is usual for the sampled images h_SD."""
        return dataclasses.replace(self, angles=Usual.of(self._angle(self.white(h_SD))),
                                   distances=Usual.of(self.density.distance(h_SD)))

    def _angle(self, white_BD: Tensor) -> Tensor:
        """Minus the largest cosine between an image and a class mean, (B,)."""
        unit_BD = torch.nn.functional.normalize(white_BD, dim=1)
        return -(unit_BD @ self.unit_PD.T).amax(1)

    def single(self) -> "Fitted":
        """The same in float32, for answers."""
        density = Density(self.density.whiten_TT.float(), self.density.mean_PT.float())
        return dataclasses.replace(self, centre_D=self.centre_D.float(),
                                   whiten_DD=self.whiten_DD.float(), unit_PD=self.unit_PD.float(),
                                   weight_MD=self.weight_MD.float(), density=density)


def fit(scatter_DD: Tensor, images: int, mean_MD: Tensor, sample_SD: Tensor,
        sample_y_S: Tensor, own: int) -> Fitted:
    """Solves the classifier, all in float64.

    scatter_DD: the sum over `images` images of (h - class mean)(h - class mean)^T. mean_MD: class
    means; not a number for a class without images, which is then never the answer. sample_y_S:
    classes of the sampled images, among the M. own: how many of the D features are the trunk's own
    means and spreads, T; they are the first ones.
    """
    values_D, vectors_DD = torch.linalg.eigh(scatter_DD / max(1, images))
    values_D = values_D.clamp_min(0)
    scale = values_D.mean().clamp_min(1e-12)
    centre_D = mean_MD.nanmean(0)
    turned_MD, turned_SD = ((x - centre_D) @ vectors_DD for x in (mean_MD, sample_SD))
    known_S = ~turned_MD[sample_y_S].isnan().any(1)
    turned_SD, sample_y_S = turned_SD[known_S], sample_y_S[known_S]
    options = _options(values_D, scale, turned_MD, turned_SD, sample_y_S)
    best = min(range(len(options)), key=lambda index: options[index][0])
    if len(sample_y_S) < FEW:
        best = len(options) // 2
    inverse_D, sharp = (values_D + SHRINKAGES[best] * scale).rsqrt(), options[best][1]
    white_MD, present_M = turned_MD * inverse_D, ~mean_MD.isnan().any(1)
    unit_PD = torch.nn.functional.normalize(white_MD[present_M], dim=1)
    density = _density(scatter_DD[:own, :own] / max(1, images), mean_MD[present_M, :own])
    return Fitted(centre_D, vectors_DD * inverse_D, unit_PD, _weights(white_MD), sharp,
                  SHRINKAGES[best], density).measured(sample_SD[known_S])


def _density(covariance_TT: Tensor, mean_PT: Tensor) -> Density:
    scale = OWN_SHRINKAGE * covariance_TT.diagonal().mean().clamp_min(1e-12)
    lower_TT = torch.linalg.cholesky(covariance_TT + scale * torch.eye(len(covariance_TT)).double())
    whiten_TT = torch.linalg.inv(lower_TT).T.contiguous()
    return Density(whiten_TT, mean_PT @ whiten_TT)


def _options(values_D: Tensor, scale: Tensor, turned_MD: Tensor, turned_SD: Tensor,
             sample_y_S: Tensor) -> list[tuple[float, float]]:
    """Cross-entropy of the samples under each shrinkage, and the sharpness that it takes."""
    present_M = ~turned_MD.isnan().any(1)
    known_MD = turned_MD[present_M]  # absent classes have no column in what follows
    if len(sample_y_S) < FEW or len(known_MD) < 2:
        return [(0.0, 1.0)] * len(SHRINKAGES)
    y_S = (present_M.long().cumsum(0) - 1)[sample_y_S]
    many = len(known_MD) > known_MD.shape[1]
    products_DD = known_MD.T @ known_MD / len(known_MD) if many else None
    options = []
    for shrinkage in SHRINKAGES:
        inverse_D = (values_D + shrinkage * scale).rsqrt()
        white_SD, white_MD = turned_SD * inverse_D, known_MD * inverse_D
        if products_DD is None:
            score_SM = white_SD @ _weights(white_MD).T
        else:  # solved for the samples, of which there are fewer
            score_SM = _solved(white_SD, inverse_D[:, None] * products_DD * inverse_D) @ white_MD.T
        sharp = sharpness(score_SM, y_S)
        options.append((float(torch.nn.functional.cross_entropy(sharp * score_SM, y_S)), sharp))
    return options


def _weights(white_MD: Tensor) -> Tensor:
    """The ridge weights of whitened class means; not a number for a class without images."""
    present_M = ~white_MD.isnan().any(1)
    known_MD = white_MD[present_M]
    M, D = known_MD.shape
    weight_MD = torch.full_like(white_MD, torch.nan)
    if M > D:  # m (I + m^T m / M)^-1 is the same, with the smaller matrix
        weight_MD[present_M] = _solved(known_MD, known_MD.T @ known_MD / M)
        return weight_MD
    products_MM = known_MD @ known_MD.T / max(1, M)
    weight_MD[present_M] = torch.linalg.solve(
        torch.eye(M, dtype=white_MD.dtype) + products_MM, known_MD)
    return weight_MD


def _solved(x_ND: Tensor, products_DD: Tensor) -> Tensor:
    """The product x (I + m^T m / M)^-1, for products_DD = m^T m / M of the whitened class means."""
    eye_DD = torch.eye(len(products_DD), dtype=products_DD.dtype)
    solved_ND: Tensor = torch.linalg.solve(eye_DD + products_DD, x_ND, left=False)
    return solved_ND


def sharpness(score_SM: Tensor, y_S: Tensor) -> float:
    """The factor on scores, 0.001 to 100, whose softmax gives the labels the smallest
    cross-entropy.
    """
    own_S = score_SM.gather(1, y_S[:, None])[:, 0]

    def slope(factor: float) -> float:  # of the cross-entropy, which is convex in the factor
        p_SM = (factor * score_SM).softmax(1)
        return float(((p_SM * score_SM).sum(1) - own_S).mean())

    low, high = math.log(1e-3), math.log(SHARPEST)
    if slope(SHARPEST) < 0:
        return SHARPEST
    for _ in range(20):  # to 1e-5 of the factor
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp((low + high) / 2)
