"""The features that the detector sees: a fixed, random expansion of a trunk's features.

Pooled means lose what varies inside an image. So the detector sees three parts of an image's
features: the mean of every channel, its standard deviation over the positions, and the means over
the positions of random ReLU features of each position (as RanPAC, arXiv 2307.02251, takes them of
pooled features). Each part is scaled by the image's own norm alone. Nothing here is learned, so no
task can change what an earlier task has contributed.

Where every task's head starts from the network's own later blocks, the detector also sees what
these blocks make of an image: their pooled features, and random features of both in place of those
of each position.

Legend: B images, C channels, H W spatial, P positions, F pooled features of the network's own head,
M random features, D expanded features.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SIDE = 8
"""A feature map is averaged to at most SIDE * SIDE positions first, which bounds the cost."""
ELEMENTS = 1 << 22
"""Most numbers of an intermediate result."""


@dataclasses.dataclass(frozen=True)
class Expansion:
    """The map from trunk features z_BCHW to h_BD, determined by a few numbers."""

    channels: int
    """Channels C of the trunk's features."""
    spread: bool
    """Whether the features have more than one position, so that they vary inside an image."""
    features: int
    """Number M of random features."""
    embedded: int = 0
    """Number F of pooled features of the network's own head; 0 where it is not used."""
    embed: Callable[[Tensor], Tensor] | None = dataclasses.field(default=None, compare=False)
    """Gives these features (B, F) of trunk features, where `embedded`."""

    def __post_init__(self) -> None:
        # RandomState's stream never changes between versions of numpy, unlike a Generator's.
        seen = self.channels + self.embedded
        draw_MS = np.random.RandomState(0).standard_normal((self.features, seen))
        weight_MS = torch.from_numpy(draw_MS / seen**0.5).float()
        object.__setattr__(self, "_weight_MS", weight_MS)

    @property
    def width(self) -> int:
        """Number D of expanded features."""
        return self.channels * (2 if self.spread else 1) + self.embedded + self.features

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
        weight_MS: Tensor = self.__dict__["_weight_MS"]
        if not self.embedded:
            parts.append((weight_MS @ scaled(z_BCP)).relu().mean(2))
            return torch.cat(parts, 1)
        assert self.embed is not None, "a detector that sees the network's own head has it"
        e_BF = scaled(self.embed(z_BCHW).float().cpu())
        seen_BS = torch.cat([parts[0], e_BF], 1)
        return torch.cat([*parts, e_BF, (seen_BS @ weight_MS.T).relu()], 1)

    def tensor(self) -> Tensor:
        """The numbers that determine it, for a checkpoint."""
        last = [self.embedded] * bool(self.embedded)
        return torch.tensor([self.channels, int(self.spread), self.features, *last])

    @staticmethod
    def from_tensor(numbers: Tensor, embed: Callable[[Tensor], Tensor] | None = None
                    ) -> "Expansion":
        """Rebuilds an expansion from the result of `tensor`. Raises: ValueError for others."""
        channels, spread, features, *last = (int(number) for number in numbers)
        embedded = last[0] if last else 0
        if (channels < 1 or spread not in (0, 1) or not 0 <= features <= 1_000_000 or len(last) > 1
                or not 0 <= embedded <= 1_000_000):
            raise ValueError(f"the detector's expansion is {numbers.tolist()}; expected channels "
                             "of 1 or more, 0 or 1, and up to a million random and other features")
        return Expansion(channels, bool(spread), features, embedded, embed)


def expansion_of(shape_CHW: tuple[int, ...], features: int,
                 embed: Callable[[Tensor], Tensor] | None = None) -> Expansion:
    """The expansion for trunk features of a shape, with so many random features."""
    channels, height, width = shape_CHW
    embedded = 0 if embed is None else embed(torch.zeros(1, *shape_CHW)).shape[1]
    return Expansion(channels, height * width > 1, features, embedded, embed)


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
