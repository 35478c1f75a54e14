"""The features that the detector sees: a fixed, random expansion of a trunk's features.

Pooled means lose what varies inside an image. So the detector sees three parts of an image's
features: the mean of every channel, its standard deviation over the positions, and the means over
the positions of random ReLU features of each position (as RanPAC, arXiv 2307.02251, takes them of
pooled features). Each part is scaled by the image's own norm alone. Nothing here is learned, so no
task can change what an earlier task has contributed.

Where every task's head starts from the network's own later blocks, the detector also sees what
these blocks make of an image: the pooled features of several of them, and random features of the
trunk's means and the last of these in place of those of each position.

Legend: B images, C channels, H W spatial, P positions, F pooled features of one of the network's
later blocks, M random features, D expanded features.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

SIDE = 8
"""A feature map is averaged to at most SIDE * SIDE positions first, which bounds the cost."""
ELEMENTS = 1 << 22
"""Most numbers of an intermediate result."""
SEEN = 1536
"""Most pooled features of the network's later blocks, of all blocks together."""
Embed = Callable[[Tensor, Sequence[int] | None], list[Tensor]]
"""Trunk features and numbers of later blocks (None: all) to the pooled features (B, F) of each."""


@dataclasses.dataclass(frozen=True)
class Expansion:
    """The map from trunk features z_BCHW to h_BD, determined by a few numbers."""

    channels: int
    """Channels C of the trunk's features."""
    spread: bool
    """Whether the features have more than one position, so that they vary inside an image."""
    features: int
    """Number M of random features."""
    blocks: tuple[int, ...] = ()
    """Numbers of the later blocks of the network that are seen, above the cut; -1 is the last."""
    widths: tuple[int, ...] = ()
    """Numbers F of their pooled features."""
    embed: Embed | None = dataclasses.field(default=None, compare=False)
    """Gives these features, where `blocks` has any."""

    def __post_init__(self) -> None:
        # RandomState's stream never changes between versions of numpy, unlike a Generator's.
        seen = self.channels + sum(self.widths[-1:])
        draw_MS = np.random.RandomState(0).standard_normal((self.features, seen))
        weight_MS = torch.from_numpy(draw_MS / seen**0.5).float()
        object.__setattr__(self, "_weight_MS", weight_MS)

    @property
    def width(self) -> int:
        """Number D of expanded features."""
        return self.own + sum(self.widths) + self.features

    @property
    def own(self) -> int:
        """Number of expanded features that are means and spreads of the trunk's channels: the
        first ones.
        """
        return self.channels * (2 if self.spread else 1)

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
        if not self.blocks:
            parts.append((weight_MS @ scaled(z_BCP)).relu().mean(2))
            return torch.cat(parts, 1)
        assert self.embed is not None, "a detector that sees the network's own head has it"
        later = [scaled(e_BF.float().cpu()) for e_BF in self.embed(z_BCHW, self.blocks)]
        seen_BS = torch.cat([parts[0], later[-1]], 1)
        return torch.cat([*parts, *later, (seen_BS @ weight_MS.T).relu()], 1)

    def tensor(self) -> Tensor:
        """The numbers that determine it, for a checkpoint."""
        later = [*self.blocks, *self.widths]
        if self.blocks == (-1,):  # as it was stored before several blocks were seen
            later = [*self.widths]
        return torch.tensor([self.channels, int(self.spread), self.features, *later])

    @staticmethod
    def from_tensor(numbers: Tensor, embed: Embed | None = None) -> "Expansion":
        """Rebuilds an expansion from the result of `tensor`. Raises: ValueError for others."""
        channels, spread, features, *later = (int(number) for number in numbers)
        if len(later) == 1:
            later = [-1, *later]
        blocks, widths = later[:len(later) // 2], later[len(later) // 2:]
        if (channels < 1 or spread not in (0, 1) or not 0 <= features <= 1_000_000
                or len(blocks) != len(widths) or not all(0 < width <= 1_000_000 for width in widths)
                or not all(-1 <= block <= 1_000_000 for block in blocks)):
            raise ValueError(f"the detector's expansion is {numbers.tolist()}; expected channels "
                             "of 1 or more, 0 or 1, up to a million random features, and numbers "
                             "of blocks with their widths")
        return Expansion(channels, bool(spread), features, tuple(blocks), tuple(widths), embed)


def expansion_of(shape_CHW: tuple[int, ...], features: int,
                 embed: Embed | None = None) -> Expansion:
    """The expansion for trunk features of a shape, with so many random features."""
    channels, height, width = shape_CHW
    every = () if embed is None else tuple(
        e_BF.shape[1] for e_BF in embed(torch.zeros(1, *shape_CHW), None))
    blocks = seen_blocks(every)
    return Expansion(channels, height * width > 1, features, blocks,
                     tuple(every[block] for block in blocks), embed)


def seen_blocks(widths: Sequence[int]) -> tuple[int, ...]:
    """The numbers of the later blocks that are seen, of so many channels each.

    While they have more than `SEEN` channels together, the widest block goes; among equally wide
    ones that whose neighbours are closest. One block stays however wide it is.
    """
    blocks = list(range(len(widths)))
    while len(blocks) > 1 and sum(widths[block] for block in blocks) > SEEN:
        widest = max(widths[block] for block in blocks)
        ends = [-len(widths), *blocks, 2 * len(widths)]
        _, place = min((ends[place + 2] - ends[place], place) for place, block in enumerate(blocks)
                       if widths[block] == widest)
        del blocks[place]
    return tuple(blocks)


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
