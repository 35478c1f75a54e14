"""The features that the detector sees: a fixed, random expansion of a trunk's features.

Pooled means lose what varies inside an image. So the detector sees three parts of an image's
features: the mean of every channel, its standard deviation over the positions, and the means over
the positions of random ReLU features of each position (as RanPAC, arXiv 2307.02251, takes them of
pooled features). Each part is scaled by the image's own norm alone. Nothing here is learned, so no
task can change what an earlier task has contributed.

Where every task's head starts from the network's own later blocks, the detector also sees what
these blocks make of an image: the pooled features of several of them and their spreads, which take
the place of random features. Those that are left are of the trunk's means and the last block.

Legend: B images, C channels, H W spatial, P positions, F pooled features of one of the network's
later blocks, M random features, D expanded features.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from partialhn.networks.backbone import spread_of

SIDE = 8
"""A feature map is averaged to at most SIDE * SIDE positions first, which bounds the cost."""
ELEMENTS = 1 << 22
"""Most numbers of an intermediate result."""
SEEN = 1536
"""Most pooled features of the network's later blocks, of all blocks together."""
SEEN_WITH_SPREADS = 2304
"""Most of them together with the blocks' spreads."""
Embed = Callable[[Tensor, Sequence[int] | None, Sequence[int]], list[Tensor]]
"""Trunk features, numbers of later blocks (None: all), and of those whose spread is wanted, to the
pooled features (B, F) of the former and the spreads (B, F) of the latter."""


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
    """Numbers F of their pooled features, then of the spreads."""
    spreads: tuple[int, ...] = ()
    """Numbers of the later blocks whose standard deviations over the positions are seen."""
    embed: Embed | None = dataclasses.field(default=None, compare=False)
    """Gives these features, where `blocks` has any."""

    def __post_init__(self) -> None:
        # RandomState's stream never changes between versions of numpy, unlike a Generator's.
        seen = self.channels + sum(self.widths[:len(self.blocks)][-1:])
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
        few_BCHW = _few_positions(z_BCHW.float().cpu())
        z_BCP = few_BCHW.flatten(2)
        parts = [scaled(z_BCP.mean(2))]
        if self.spread:
            parts.append(scaled(spread_of(few_BCHW)))
        weight_MS: Tensor = self.__dict__["_weight_MS"]
        if not self.blocks:
            parts.append((weight_MS @ scaled(z_BCP)).relu().mean(2))
            return torch.cat(parts, 1)
        assert self.embed is not None, "a detector that sees the network's own head has it"
        later = [scaled(e_BF.float().cpu())
                 for e_BF in self.embed(z_BCHW, self.blocks, self.spreads)]
        seen_BS = torch.cat([parts[0], later[len(self.blocks) - 1]], 1)
        return torch.cat([*parts, *later, (seen_BS @ weight_MS.T).relu()], 1)

    def tensor(self) -> Tensor:
        """The numbers that determine it, for a checkpoint."""
        # versions that know no spreads refuse numbers below -1
        later = [*self.blocks, *(-2 - block for block in self.spreads), *self.widths]
        if self.blocks == (-1,) and not self.spreads:  # stored before several blocks were seen
            later = [*self.widths]
        return torch.tensor([self.channels, int(self.spread), self.features, *later])

    @staticmethod
    def from_tensor(numbers: Tensor, embed: Embed | None = None) -> "Expansion":
        """Rebuilds an expansion from the result of `tensor`. Raises: ValueError for others."""
        channels, spread, features, *later = (int(number) for number in numbers)
        if len(later) == 1:
            later = [-1, *later]
        seen, widths = later[:len(later) // 2], later[len(later) // 2:]
        blocks = [block for block in seen if block >= -1]
        spreads = [-2 - block for block in seen if block < -1]
        if (channels < 1 or spread not in (0, 1) or not 0 <= features <= 1_000_000
                or len(seen) != len(widths) or not all(0 < width <= 1_000_000 for width in widths)
                or not all(-1_000_000 <= block <= 1_000_000 for block in seen)
                or seen[:len(blocks)] != blocks or (spreads and not blocks)):
            raise ValueError(f"the detector's expansion is {numbers.tolist()}; expected channels "
                             "of 1 or more, 0 or 1, up to a million random features, and numbers "
                             "of blocks with their widths")
        return Expansion(channels, bool(spread), features, tuple(blocks), tuple(widths),
                         tuple(spreads), embed)


def expansion_of(shape_CHW: tuple[int, ...], features: int,
                 embed: Embed | None = None) -> Expansion:
    """The expansion for trunk features of a shape, with so many features that are random or the
    spreads of later blocks.
    """
    channels, height, width = shape_CHW
    if embed is None:
        return Expansion(channels, height * width > 1, features)
    z_1CHW = torch.linspace(0, 1, channels * height * width).view(1, *shape_CHW)
    every = [e_1F.shape[1] for e_1F in embed(z_1CHW, None, ())]
    blocks = seen_blocks(every)
    spreads = _seen_spreads(every, blocks, lambda inner: [
        bool(e_1F.any()) for e_1F in embed(z_1CHW, (), inner)])
    widths = tuple(every[block] for block in (*blocks, *spreads))
    random = max(0, features - sum(widths[len(blocks):]))
    return Expansion(channels, height * width > 1, random, blocks, widths, spreads, embed)


def _seen_spreads(widths: Sequence[int], blocks: Sequence[int],
                  varies: Callable[[Sequence[int]], list[bool]]) -> tuple[int, ...]:
    """The blocks whose spreads are seen: of the seen ones those that vary inside an image, without
    the network's last one, as far as `SEEN_WITH_SPREADS` allows.
    """
    inner = [block for block in blocks if 0 <= block < len(widths) - 1]
    inner = [block for block, varied in zip(inner, varies(inner) if inner else [], strict=True)
             if varied]
    left = SEEN_WITH_SPREADS - sum(widths[block] for block in blocks)
    chosen = [inner[place] for place in seen_blocks([widths[block] for block in inner], left)]
    return tuple(chosen) if sum(widths[block] for block in chosen) <= left else ()


def seen_blocks(widths: Sequence[int], most: int = SEEN) -> tuple[int, ...]:
    """The numbers of the later blocks that are seen, of so many channels each.

    While they have more than `most` channels together, the widest block goes; among equally wide
    ones that whose neighbours are closest. One block stays however wide it is.
    """
    blocks = list(range(len(widths)))
    while len(blocks) > 1 and sum(widths[block] for block in blocks) > most:
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
