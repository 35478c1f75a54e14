"""The features that the detector sees: a fixed, random expansion of a trunk's features.

Pooled means lose what varies inside an image. So the detector sees three parts of an image's
features: the mean of every channel, its standard deviation over the positions, and the means over
the positions of random ReLU features of each position (as RanPAC, arXiv 2307.02251, takes them of
pooled features). Each part is scaled by the image's own norm alone. Nothing here is learned, so no
task can change what an earlier task has contributed.

Legend: B images, C channels, H W spatial, P positions, M random features, D expanded features.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

SIDE = 8
"""A feature map is averaged to at most SIDE * SIDE positions first, which bounds the cost."""
ELEMENTS = 1 << 22
"""Most numbers of an intermediate result."""


@dataclasses.dataclass(frozen=True)
class Expansion:
    """The map from trunk features z_BCHW to h_BD, determined by three numbers."""

    channels: int
    """Channels C of the trunk's features."""
    spread: bool
    """Whether the features have more than one position, so that they vary inside an image."""
    features: int
    """Number M of random features."""

    def __post_init__(self) -> None:
        # RandomState's stream never changes between versions of numpy, unlike a Generator's.
        draw_MC = np.random.RandomState(0).standard_normal((self.features, self.channels))
        weight_MC = torch.from_numpy(draw_MC / self.channels**0.5).float()
        object.__setattr__(self, "_weight_MC", weight_MC)

    @property
    def width(self) -> int:
        """Number D of expanded features."""
        return self.channels * (2 if self.spread else 1) + self.features

    def __call__(self, z_BCHW: Tensor) -> Tensor:
        """h_BD, float32 and on the CPU; a row depends on no other image."""
        if not len(z_BCHW):
            return torch.empty(0, self.width)
        positions = min(z_BCHW.shape[2] * z_BCHW.shape[3], SIDE * SIDE)
        step = max(1, ELEMENTS // (positions * max(self.features, self.channels)))
        return torch.cat([self._expand(chunk_BCHW) for chunk_BCHW in torch.split(z_BCHW, step)])

    def _expand(self, z_BCHW: Tensor) -> Tensor:
        z_BCP = _few_positions(z_BCHW.float().cpu()).flatten(2)
        parts = [scaled(z_BCP.mean(2))]
        if self.spread:
            parts.append(scaled(z_BCP.std(2, correction=0)))
        weight_MC: Tensor = self.__dict__["_weight_MC"]
        parts.append((weight_MC @ scaled(z_BCP)).relu().mean(2))
        return torch.cat(parts, 1)

    def tensor(self) -> Tensor:
        """The three numbers, for a checkpoint."""
        return torch.tensor([self.channels, int(self.spread), self.features])

    @staticmethod
    def from_tensor(numbers_3: Tensor) -> "Expansion":
        """Rebuilds an expansion from the result of `tensor`. Raises: ValueError for others."""
        channels, spread, features = (int(number) for number in numbers_3)
        if channels < 1 or spread not in (0, 1) or not 0 <= features <= 1_000_000:
            raise ValueError(f"the detector's expansion is {numbers_3.tolist()}; expected channels "
                             "of 1 or more, 0 or 1, and up to a million random features")
        return Expansion(channels, bool(spread), features)


def expansion_of(shape_CHW: tuple[int, ...], features: int) -> Expansion:
    """The expansion for trunk features of a shape, with so many random features."""
    channels, height, width = shape_CHW
    return Expansion(channels, height * width > 1, features)


def scaled(x_BC: Tensor) -> Tensor:
    """Vectors along dimension 1, scaled so that the mean of their squares is 1; zero stays zero."""
    square_B1 = x_BC.square().sum(1, keepdim=True).clamp_min(1e-12)
    return x_BC * (square_B1 / x_BC.shape[1]).rsqrt()


def _few_positions(z_BCHW: Tensor) -> Tensor:
    height, width = z_BCHW.shape[2:]
    if height * width <= SIDE * SIDE:
        return z_BCHW
    columns = min(width, SIDE)
    return torch.nn.functional.adaptive_avg_pool2d(
        z_BCHW, (min(height, SIDE * SIDE // columns), columns))
