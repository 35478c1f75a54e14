"""Backbones: a whole network of any family as a list of blocks and a linear classifier.

A network can be cut before its first block and after each block. What a block gives is always
stored and counted as a map (B, C, H, W), whatever the network itself calculates with: the tokens
of a transformer (B, N, C) become the map (B, C, N, 1).

Legend: B batch, C channels, H W spatial, N tokens, F features before the classifier, K classes.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from partialhn.config import Arithmetic
from partialhn.errors import InputError
from partialhn.networks.draws import seeded
from partialhn.networks.table import BACKBONES
from partialhn.networks.tensors import hash_tensors
from partialhn.pixels import Pixels
from partialhn.plugins import load_object

Layout = Literal["BCHW", "BNC", "BHWC"]
"""Order of the dimensions of what a network's blocks pass on: maps with channels first, tokens, or
maps with channels last."""


@dataclasses.dataclass(frozen=True)
class Backbone:
    """How to build a network, and where it can be cut."""

    build: Callable[[int, int], nn.Module]
    """Builds a freshly initialised body whose classifier has the given number of classes, for
    square images of the given number of pixels a side."""
    blocks: Callable[[nn.Module], Mapping[str, nn.Module]]
    """The blocks of a body by name, in order; the network can be cut after each of them. The first
    takes normalised float32 pixels (B, 3, H, W), and each other one takes what the block before it
    gives. The last one gives what goes to the classifier, (B, F), or a map whose mean over H and W
    does."""
    classifier: str
    """Attribute of the body that is the classifier, an nn.Linear."""
    layout: Layout = "BCHW"
    """Order of the dimensions of what the blocks pass on."""
    call: str = ""
    """The call that builds the same body with the library that has it, for `classes` and `size`;
    empty where none has it."""
    replaced: tuple[str, ...] = ()
    """Further classifiers of the library's network that `classifier` stands for, by name."""


def find_backbone(name: str) -> Backbone:
    """The backbone of a name. Raises: InputError for an unknown name or a line that is none."""
    line = BACKBONES.find(name)
    backbone = load_object(line, f"backbone {name!r}") if isinstance(line, str) else line
    if not isinstance(backbone, Backbone) and callable(backbone) and ":" in name:
        backbone = backbone(name.partition(":")[2])
    if not isinstance(backbone, Backbone):
        raise InputError(f"backbone {name!r} is a {type(backbone).__name__}; allowed: a "
                         "partialhn.networks.backbone.Backbone")
    return backbone


def to_map(z: Tensor, layout: Layout) -> Tensor:
    """What a block of this layout gave as a map (B, C, H, W); pooled features (B, F) as (B, F, 1,
    1), and tokens (B, N, C) as (B, C, N, 1).
    """
    if z.dim() == 2:
        return z[:, :, None, None]
    if layout == "BNC":
        return z.transpose(1, 2)[..., None]
    return z.permute(0, 3, 1, 2) if layout == "BHWC" else z


def from_map(z_BCHW: Tensor, layout: Layout) -> Tensor:
    """Restores what a block of this layout gave from its map."""
    if layout == "BNC":
        return z_BCHW[..., 0].transpose(1, 2)
    return z_BCHW.permute(0, 2, 3, 1) if layout == "BHWC" else z_BCHW


NARROW = 32
"""Input channels of a convolution below which a CPU is faster with channels last."""


def prefers_channels_last(blocks: nn.Module) -> bool:
    """Whether a CPU convolves the maps of these blocks faster with channels last in memory.

    A step takes 0.58 to 0.98 of the time so where convolutions are depthwise, 0.71 to 0.90 where
    they are narrow, and 0.96 to 1.14 in the later blocks of ResNets, which stay as they are
    (docs/measurements/step.md).
    """
    return any(layer.groups > 1 or layer.in_channels < NARROW for layer in blocks.modules()
               if isinstance(layer, nn.Conv2d))


def laid_out(z_BCHW: Tensor, channels_last: bool) -> Tensor:
    """A map in the layout in which its device convolves it fastest in float32; a GPU's stays."""
    kind = z_BCHW.device.type
    if channels_last and kind != "cuda" and not torch.is_autocast_enabled(kind):
        return z_BCHW.contiguous(memory_format=torch.channels_last)
    return z_BCHW


ROUNDING = 1e-6
"""A spread below this share of the mean is the mean's own rounding."""


def spread_of(z_BCHW: Tensor) -> Tensor:
    """The standard deviation of each channel over the positions (B, C), exactly zero where a
    channel is the same everywhere.

    PyTorch's own one takes twenty times as long on a CPU for the maps of a few images.
    """
    mean_BC11 = z_BCHW.mean((2, 3), keepdim=True)
    around_BCHW = z_BCHW - mean_BC11
    spread_BC = around_BCHW.mul_(around_BCHW).mean((2, 3)).sqrt_()
    return spread_BC.masked_fill_(spread_BC <= ROUNDING * mean_BC11[..., 0, 0].abs(), 0)


def pooled(z: Tensor) -> Tensor:
    """The features before the classifier (B, F), from what the last block gave."""
    return z if z.dim() == 2 else z.mean((2, 3))


def named_arithmetic(kind: Arithmetic) -> str:
    """What an arithmetic adds to a name; ieee, the only one of version 0.1.0, adds nothing."""
    return "" if kind == "ieee" else f"/{kind}"


class Network(nn.Module):
    """A whole backbone: normalisation of the pixels, the blocks, pooling and a classifier.

    Takes uint8 images_BCHW (C = 3; transformers take `input_size` pixels a side, the others any
    size) and gives logits_BK. `mean_C` and `std_C` are in units of a pixel scaled to 0..1.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, name: str, body: nn.Module, input_size: int = 32) -> None:
        super().__init__()
        self.name, self.backbone, self.input_size = name, find_backbone(name), input_size
        self.body, self.pixels = body, Pixels()
        self.arithmetic: Arithmetic = "ieee"
        """Arithmetic of the trunk that is cut from it."""
        self.notes: tuple[str, ...] = ()
        """What a user should know about weights that somebody else trained."""
        self._channels_last = prefers_channels_last(body)
        self.register_buffer("mean_C", torch.tensor(self.pixels.mean))
        self.register_buffer("std_C", torch.tensor(self.pixels.std))

    def set_pixels(self, pixels: Pixels) -> None:
        """Sets which pixels the weights expect, their normalisation included."""
        self.pixels = pixels
        self.set_normalisation(torch.tensor(pixels.mean), torch.tensor(pixels.std))

    def set_normalisation(self, mean_C: Tensor, std_C: Tensor) -> None:
        """Sets mean and spread of a pixel scaled to 0..1."""
        self.mean_C.copy_(mean_C)
        self.std_C.copy_(std_C)

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """uint8 pixels to float32 of about zero mean and unit variance."""
        return (images_BCHW.float() / 255 - self.mean_C[:, None, None]) / self.std_C[:, None, None]

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by name, in order."""
        return dict(self.backbone.blocks(self.body))

    @property
    def classifier(self) -> nn.Linear:
        return cast(nn.Linear, self.body.get_submodule(self.backbone.classifier))

    @property
    def width(self) -> int:
        """Number of features F that the classifier takes."""
        return self.classifier.in_features

    def without_classifier(self) -> dict[str, Tensor]:
        """All weights and statistics by name, except the classifier's."""
        return without_classifier(self.name, self.state_dict())

    def fingerprint(self) -> str:
        """SHA-256 of all that a trunk is cut from: the weights but for the classifier's, the way an
        image becomes the input, and the arithmetic.
        """
        return hash_tensors(self.without_classifier(),
                            self.pixels.geometry + named_arithmetic(self.arithmetic))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.through(self.blocks().values(), images_BCHW)

    def through(self, blocks: Iterable[nn.Module], images_BCHW: Tensor) -> Tensor:
        """logits_BK as `forward` gives them; blocks: those of `blocks()`, divided once."""
        z = laid_out(self.normalise(images_BCHW), self._channels_last)
        for block in blocks:
            z = block(z)
        return cast(Tensor, self.classifier(pooled(z)))


def classifier_prefix(name: str) -> str:
    """How the names of the classifier's tensors begin in a `Network` of this backbone."""
    return f"body.{find_backbone(name).classifier}."


def without_classifier(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `Network` of this backbone, except the classifier's."""
    prefix = classifier_prefix(name)
    return {key: value for key, value in tensors.items() if not key.startswith(prefix)}


def build_network(name: str, classes: int, seed: int = 0, input_size: int = 32) -> Network:
    """A freshly initialised backbone with a classifier of K = `classes` outputs.

    Raises: InputError for an unknown name, or an image size that the network cannot take.
    """
    backbone = find_backbone(name)
    with seeded(seed):
        return Network(name, backbone.build(classes, input_size), input_size)
