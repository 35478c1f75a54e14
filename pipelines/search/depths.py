"""The depths at which the network of a search can be cut, and the words for them."""

import dataclasses
import functools
from collections.abc import Sequence

from partialhn.config import Config
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import depth_number
from partialhn.networks.depths import depths_of
from partialhn.networks.table import cut_unit

FEW = 5
"""Networks with at most so many depths are searched at each of them, others first at so many."""


@dataclasses.dataclass(frozen=True)
class Depths:
    """The depths of one network. They are found from its name, so a search stores no names."""

    network: str
    blocks: tuple[str, ...]
    """Names of its blocks, in order."""
    first: tuple[int, ...]
    """The depths that a search begins with: all, or the `coarse_grid`."""

    @property
    def unit(self) -> str:
        """The word for one step of depth: stage or block."""
        return cut_unit(self.network)

    @property
    def deepest(self) -> int:
        """The depth at which everything but the classifier is frozen."""
        return len(self.blocks)

    def freezing(self, depth: int) -> str:
        """The words for a depth that complete the phrase "freezing ..."."""
        if depth == 0:
            return "nothing"
        return ("everything but the classifier" if depth == self.deepest else
                f"through {self.blocks[depth - 1]}")

    def number(self, depth: object) -> int:
        """The number of a depth that is given as a number, a block's name or a share.

        Raises: InputError for a depth that the network does not have.
        """
        if isinstance(depth, float) and depth.is_integer():  # the ends of a stored range
            depth = int(depth)
        return depth_number(depth if isinstance(depth, int) else str(depth), self.blocks,
                            self.network)


def find_depths(config: Config) -> Depths:
    """The depths of the configured network. Raises: InputError where it cannot be built."""
    return _find(config.backbone.backbone, config.data.input_size)


@functools.cache
def _find(name: str, input_size: int) -> Depths:
    network = build_network(name, 2, input_size=input_size)
    shares = [depth.frozen_share for depth in depths_of(network)]
    first = tuple(range(len(shares))) if len(shares) <= FEW else coarse_grid(shares)
    return Depths(name, tuple(network.blocks()), first)


def coarse_grid(shares: Sequence[float]) -> tuple[int, ...]:
    """The depths that are nearest to 20, 40, 60 and 80 % of frozen multiply-adds, and the deepest.

    shares: the frozen share of multiply-adds at each depth, from 0 to 1.

    Equal steps of multiply-adds save equal amounts of training, which is what depth is chosen for;
    blocks differ in size. The shares cost one forward pass of one image. Depth 0, which trains the
    whole network from pixels, is left to the refinement.
    """
    depths = range(1, len(shares))
    wanted = [step / FEW for step in range(1, FEW)]
    nearest = {min(depths, key=lambda depth: abs(shares[depth] - share)) for share in wanted}
    return tuple(sorted(nearest | {depths[-1]}))
