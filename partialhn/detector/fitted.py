"""The detector's classifier, solved from its statistics: ridge regression over all classes.

Targets are one for an image's class and zero for the others, every class counts alike, and the
penalty is the shrinkage of the covariance within classes. In coordinates that this covariance
whitens, with class means m (M, D), the weights are (I + m m^T / M)^-1 m. The kept samples choose
what the sums cannot say: the shrinkage, and the sharpness of the probabilities.

Legend: B images, S sampled images of all tasks, M classes of all tasks, D expanded features.
"""

import dataclasses
import math

import torch
from torch import Tensor

SHRINKAGES = tuple(10.0 ** (power / 2) for power in range(-6, 3))
"""Isotropic parts of the covariance that are tried, in units of its mean eigenvalue."""
SHARPEST = 100.0
"""Largest factor on the scores."""
FEW = 8
"""Fewer samples than this choose nothing: the middle of `SHRINKAGES` is taken."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """A solved classifier, in whitened coordinates: their origin is the mean of the class means."""

    centre_D: Tensor
    whiten_DD: Tensor
    mean_MD: Tensor
    """Whitened class means."""
    weight_MD: Tensor
    """Weights of whitened features for the score of each class; not a number for a class without
    images."""
    sharpness: float
    """Factor on the classes' scores."""
    shrinkage: float
    usual: float
    """Largest squared distance of a sampled image to its nearest class mean."""

    def white(self, h_BD: Tensor) -> Tensor:
        """Whitened features."""
        return (h_BD - self.centre_D) @ self.whiten_DD

    def log_probabilities(self, white_BD: Tensor) -> Tensor:
        """Log-probabilities of all classes (B, M), from whitened features."""
        score_BM = (white_BD @ self.weight_MD.T).nan_to_num(nan=-torch.inf)
        return (self.sharpness * score_BM).log_softmax(1)

    def strangeness(self, white_BD: Tensor) -> Tensor:
        """How little an image resembles any class: (B,), 0 and more.

        One minus the largest cosine between the image and a class mean, seen from the mean of all:
        it tells near strangers best. An image that is further from every class mean than any
        sampled image has its distance added, as a share of the usual one.
        """
        unit_BD, unit_MD = (torch.nn.functional.normalize(x, dim=1)
                            for x in (white_BD, self.mean_MD.nan_to_num()))
        further_B = (self._nearest(white_BD) / self.usual - 1).clamp_min(0)
        return 1 - (unit_BD @ unit_MD.T).amax(1) + further_B

    def _nearest(self, white_BD: Tensor) -> Tensor:
        """Squared distance to the nearest class mean, (B,)."""
        nearer_BM = white_BD @ self.mean_MD.T - self.mean_MD.square().sum(1) / 2
        return white_BD.square().sum(1) - 2 * nearer_BM.nan_to_num(nan=-torch.inf).amax(1)

    def single(self) -> "Fitted":
        """The same in float32, for answers."""
        return dataclasses.replace(self, centre_D=self.centre_D.float(),
                                   whiten_DD=self.whiten_DD.float(), mean_MD=self.mean_MD.float(),
                                   weight_MD=self.weight_MD.float())


def fit(scatter_DD: Tensor, images: int, mean_MD: Tensor, sample_SD: Tensor,
        sample_y_S: Tensor) -> Fitted:
    """Solves the classifier, all in float64.

    scatter_DD: the sum over `images` images of (h - class mean)(h - class mean)^T. mean_MD: class
    means; not a number for a class without images, which is then never the answer. sample_y_S:
    classes of the sampled images, among the M.
    """
    values_D, vectors_DD = torch.linalg.eigh(scatter_DD / max(1, images))
    values_D = values_D.clamp_min(0)
    scale = values_D.mean().clamp_min(1e-12)
    centre_D = mean_MD.nanmean(0)
    turned_MD, turned_SD = ((x - centre_D) @ vectors_DD for x in (mean_MD, sample_SD))
    known_S = ~turned_MD[sample_y_S].isnan().any(1)
    turned_SD, sample_y_S = turned_SD[known_S], sample_y_S[known_S]
    options = [_option(values_D, scale, shrinkage, turned_MD, turned_SD, sample_y_S)
               for shrinkage in SHRINKAGES]
    best = min(range(len(options)), key=lambda index: options[index][0])
    if len(sample_y_S) < FEW:
        best = len(options) // 2
    inverse_D, sharp = (values_D + SHRINKAGES[best] * scale).rsqrt(), options[best][1]
    white_MD = turned_MD * inverse_D
    fitted = Fitted(centre_D, vectors_DD * inverse_D, white_MD, _weights(white_MD), sharp,
                    SHRINKAGES[best], math.inf)
    if not len(turned_SD):
        return fitted
    return dataclasses.replace(
        fitted, usual=max(fitted._nearest(turned_SD * inverse_D).amax().item(), 1e-12))


def _option(values_D: Tensor, scale: Tensor, shrinkage: float, turned_MD: Tensor,
            turned_SD: Tensor, sample_y_S: Tensor) -> tuple[float, float]:
    """Cross-entropy of the samples under one shrinkage, and the sharpness that it takes."""
    inverse_D = (values_D + shrinkage * scale).rsqrt()
    present_M = ~turned_MD.isnan().any(1)
    if len(sample_y_S) < FEW or int(present_M.sum()) < 2:
        return 0.0, 1.0
    place_M = present_M.long().cumsum(0) - 1  # absent classes have no column in what follows
    score_SM, y_S = (turned_SD * inverse_D) @ _weights(
        turned_MD[present_M] * inverse_D).T, place_M[sample_y_S]
    sharp = sharpness(score_SM, y_S)
    return float(torch.nn.functional.cross_entropy(sharp * score_SM, y_S)), sharp


def _weights(white_MD: Tensor) -> Tensor:
    """The ridge weights of whitened class means; not a number for a class without images."""
    present_M = ~white_MD.isnan().any(1)
    known_MD = white_MD[present_M]
    M, D = known_MD.shape
    weight_MD = torch.full_like(white_MD, torch.nan)
    if M > D:  # m (I + m^T m / M)^-1 is the same, with the smaller matrix
        products_DD = known_MD.T @ known_MD / M
        weight_MD[present_M] = torch.linalg.solve(
            torch.eye(D, dtype=white_MD.dtype) + products_DD, known_MD, left=False)
        return weight_MD
    products_MM = known_MD @ known_MD.T / max(1, M)
    weight_MD[present_M] = torch.linalg.solve(
        torch.eye(M, dtype=white_MD.dtype) + products_MM, known_MD)
    return weight_MD


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
