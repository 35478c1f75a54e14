"""The cut: a network divided at a freeze depth into its trunk and the blocks of its head.

Legend: B batch, C channels, H W spatial, F features before the classifier.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from partialhn.errors import InputError
from partialhn.networks.backbone import Layout, Network
from partialhn.networks.trunk import Trunk, feature_shape


@dataclasses.dataclass(frozen=True)
class CutNetwork:
    """A copy of a network, cut at a freeze depth."""

    trunk: Trunk
    """The blocks below the cut, frozen."""
    stages: nn.Sequential
    """The blocks above the cut, with the network's weights: the head's shapes and its start."""
    names: Mapping[str, str]
    """Names of the tensors of `stages` in the whole network, such as blocks.11.attn.qkv.weight."""
    width: int
    """Number of features F that the classifier takes."""
    layout: Layout
    """Order of the dimensions of what the blocks pass on."""

    @staticmethod
    def of(network: Network, freeze_depth: int) -> "CutNetwork":
        """Cuts a network, which stays as it is.

        Raises: InputError for a depth the network does not have.
        """
        blocks = network.blocks()
        if not 0 <= freeze_depth <= len(blocks):
            raise InputError(f"freeze_depth is {freeze_depth}; allowed: 0 (nothing frozen) to "
                             f"{len(blocks)} (all blocks of {network.name})")
        above = nn.Sequential(*list(blocks.values())[freeze_depth:])
        whole = {id(value): name for name, value in network.body.named_parameters()}
        names = {name: whole[id(value)] for name, value in above.named_parameters()}
        copies = copy.deepcopy(list(blocks.values()))
        return CutNetwork(Trunk(network, tuple(blocks), copies[:freeze_depth]),
                          nn.Sequential(*copies[freeze_depth:]), names, network.width,
                          network.backbone.layout)

    @property
    def feature_layout(self) -> Layout:
        """Order of the dimensions in which the first block above the cut takes features; pixels,
        at depth 0, are maps in every network.
        """
        return self.layout if len(self.trunk.stages) else "BCHW"

    @property
    def channels(self) -> int:
        """Number of channels C of the trunk's features."""
        size = self.trunk.input_size
        return feature_shape(self.trunk, torch.empty(1, 3, size, size))[0]


def depth_number(freeze_depth: int | str, names: Sequence[str], name: str) -> int:
    """The number of a depth that is given as a number, as the name of the last frozen block, or as
    a share of the blocks, such as 75% (the nearest depth).

    Args:
        freeze_depth: the depth as a user gives it.
        names: the network's blocks, in order.
        name: the network, for messages.

    Raises: InputError for a depth that the network does not have.
    """
    text = str(freeze_depth)
    if text == "auto":
        return round(AUTO_SHARE * len(names))
    if text in names:
        return list(names).index(text) + 1
    share = text.removesuffix("%")
    if text.endswith("%") and share.replace(".", "", 1).isdecimal() and float(share) <= 100:
        return round(float(share) / 100 * len(names))
    if text.isdecimal() and int(text) <= len(names):
        return int(text)
    raise InputError(
        f"freeze_depth is {freeze_depth!r}; allowed: 0 (nothing frozen) to {len(names)} (all "
        f"blocks of {name}), a share such as 75%, or a block: {', '.join(names)}")


AUTO_SHARE = 0.75
"""Share of a network's blocks that is frozen where nobody says how many."""


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device: its structure and shapes without its numbers."""
    known: dict[int, object] = {}
    for value in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(value, device="meta")
        known[id(value)] = (nn.Parameter(empty, value.requires_grad)
                            if isinstance(value, nn.Parameter) else empty)
    return copy.deepcopy(module, known)
