"""The depths at which the network of a search can be cut, and the words for them."""

import dataclasses
import functools

from partialhn.config import Config
from partialhn.networks.backbone import build_network
from partialhn.networks.cut import depth_number
from partialhn.networks.table import cut_unit


@dataclasses.dataclass(frozen=True)
class Depths:
    """The depths of one network. They are found from its name, so a search stores no names."""

    network: str
    blocks: tuple[str, ...]
    """Names of its blocks, in order."""

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
        return depth_number(depth if isinstance(depth, int) else str(depth), self.blocks,
                            self.network)


def find_depths(config: Config) -> Depths:
    """The depths of the configured network. Raises: InputError where it cannot be built."""
    return _find(config.backbone.backbone, config.data.input_size)


@functools.cache
def _find(name: str, input_size: int) -> Depths:
    network = build_network(name, 2, input_size=input_size)
    return Depths(name, tuple(network.blocks()))
