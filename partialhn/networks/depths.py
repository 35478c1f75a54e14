"""The depths at which a network can be cut, and what each of them means.

Legend: B batch, C channels, H W spatial.
"""

import dataclasses
import fnmatch

import torch
from torch import nn

from partialhn.errors import InputError
from partialhn.networks import timm_models, torchvision_models
from partialhn.networks.backbone import Network, pooled, to_map
from partialhn.networks.cut import CutNetwork
from partialhn.networks.head import chosen_matrices
from partialhn.networks.table import BACKBONES
from partialhn.networks.trunk import multiply_adds


@dataclasses.dataclass(frozen=True)
class Depth:
    """One place at which a network can be cut."""

    depth: int
    """Number of frozen blocks."""
    name: str
    """The last frozen block; "pixels" where nothing is frozen."""
    shape_CHW: tuple[int, int, int]
    """Channels, height and width of an image's features; for tokens their width, number and 1."""
    frozen_share: float
    """Share of the network's multiply-adds below the cut, the classifier left out."""
    generated: int
    """Number of weights above the cut that the hypernetwork generates for each task."""

    @property
    def numbers(self) -> int:
        """Number of values in one view of an image's features."""
        return self.shape_CHW[0] * self.shape_CHW[1] * self.shape_CHW[2]


@torch.no_grad()
def depths_of(network: Network, generate: str = "all") -> list[Depth]:
    """Every depth of a network, shallowest first, from one forward pass of one image.

    generate: which matrices are generated, as in `HypernetConfig.generate`.

    Raises: InputError where `generate` names no matrix of the network.
    """
    cut = CutNetwork.of(network.eval(), 0)
    weights = [0] * len(cut.stages)
    for name, value in chosen_matrices(cut, generate):
        weights[int(name.partition(".")[0])] += value.numel()
    size, device = network.input_size, network.mean_C.device
    z = network.normalise(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    maps, macs = [z], [0]
    for block in cut.stages:
        macs.append(macs[-1] + multiply_adds(block, z))
        z = block(z)
        maps.append(to_map(z, cut.layout))
    maps[-1] = pooled(z)[:, :, None, None]
    names = ("pixels", *cut.trunk.names)
    return [Depth(depth, names[depth], (z_BCHW.shape[1], z_BCHW.shape[2], z_BCHW.shape[3]),
                  macs[depth] / max(macs[-1], 1), sum(weights[depth:]))
            for depth, z_BCHW in enumerate(maps)]


def parameter_count(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(value.numel() for value in module.parameters())


def known_backbones(pattern: str) -> list[str]:
    """Names of all backbones that match a shell pattern, such as timm:*dinov3*.

    The names of timm are among them where it is installed; not each of them can be cut.
    """
    names = [*BACKBONES, "partialhn:slim_resnet18"]
    names += [f"torchvision:{name}" for name in torchvision_models.known()]
    try:
        names += [f"timm:{name}" for name in timm_models.timm().list_models()]
    except InputError:  # timm is not installed
        if pattern.startswith("timm:"):
            raise
    return [name for name in names if fnmatch.fnmatch(name, pattern)]
