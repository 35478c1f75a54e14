"""The cut: a network divided at a freeze depth into its trunk and the stages of its head."""

import copy
import dataclasses

import torch
from torch import nn

from partialhn.errors import InputError
from partialhn.networks.backbone import Network
from partialhn.networks.trunk import Trunk


@dataclasses.dataclass(frozen=True)
class CutNetwork:
    """A copy of a network, cut at a freeze depth."""

    trunk: Trunk
    """The stages below the cut, frozen."""
    stages: nn.Sequential
    """The stages above the cut, with the network's weights: the head's shapes and its start."""
    width: int
    """Number of features F that the classifier takes."""

    @staticmethod
    def of(network: Network, freeze_depth: int) -> "CutNetwork":
        """Cuts a network, which stays as it is.

        Raises: InputError for a depth the network does not have.
        """
        total = len(network.backbone.stage_names)
        if not 0 <= freeze_depth <= total:
            raise InputError(f"freeze_depth is {freeze_depth}; allowed: 0 (nothing frozen) to "
                             f"{total} (all stages of {network.name})")
        stages = copy.deepcopy(network.stages())
        return CutNetwork(Trunk(network, stages[:freeze_depth]),
                          nn.Sequential(*stages[freeze_depth:]), network.width)


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device: its structure and shapes without its numbers."""
    known: dict[int, object] = {}
    for value in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(value, device="meta")
        known[id(value)] = (nn.Parameter(empty, value.requires_grad)
                            if isinstance(value, nn.Parameter) else empty)
    return copy.deepcopy(module, known)
