"""Backbones: a whole network as a list of stages and a linear classifier.

Legend: B batch, C channels, H W spatial, F features before the classifier, K classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.table import BACKBONES
from partialhn.pixels import Pixels
from partialhn.plugins import load_object

RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """How to build a network, and where it can be cut."""

    build: Callable[[int], nn.Module]
    """Builds a freshly initialised body whose classifier has the given number of classes."""
    stage_names: tuple[str, ...]
    """Names of the stages in order; the network can be cut after each of them."""
    stages: Callable[[nn.Module], Sequence[nn.Sequential]]
    """The stages of a body, as many as names. The first takes normalised float32 pixels
    (B, 3, H, W), each other one takes what the stage before it gives, and the last gives
    (B, F, H, W), whose mean over H and W goes to the classifier."""
    classifier: str
    """Attribute of the body that is the classifier, an nn.Linear."""


def resnet_stages(body: nn.Module) -> list[nn.Sequential]:
    """The four stages of a ResNet; the stem belongs to the first."""
    blocks = [cast(nn.Sequential, getattr(body, name)) for name in RESNET_STAGES]
    stem = [cast(nn.Module, getattr(body, name)) for name in ("conv1", "bn1", "relu", "maxpool")]
    return [nn.Sequential(*stem, *blocks[0]), *blocks[1:]]


def find_backbone(name: str) -> Backbone:
    """The backbone of a name. Raises: InputError for an unknown name or a line that is none."""
    line = BACKBONES.find(name)
    backbone = load_object(line, f"backbone {name!r}") if isinstance(line, str) else line
    if not isinstance(backbone, Backbone):
        raise InputError(f"backbone {name!r} is a {type(backbone).__name__}; allowed: a "
                         "partialhn.networks.backbone.Backbone")
    return backbone


class Network(nn.Module):
    """A whole backbone: normalisation of the pixels, the stages, pooling and a classifier.

    Takes uint8 images_BCHW (C = 3, any size) and gives logits_BK. `mean_C` and `std_C` are in
    units of a pixel scaled to 0..1.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, name: str, body: nn.Module, input_size: int = 32) -> None:
        super().__init__()
        self.name, self.backbone, self.input_size = name, find_backbone(name), input_size
        self.body, self.pixels = body, Pixels()
        self.notes: tuple[str, ...] = ()
        """What a user should know about weights that somebody else trained."""
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

    def stages(self) -> list[nn.Sequential]:
        """The stages in order."""
        return list(self.backbone.stages(self.body))

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

    def forward(self, images_BCHW: Tensor) -> Tensor:
        z_BCHW = self.normalise(images_BCHW)
        for stage in self.stages():
            z_BCHW = stage(z_BCHW)
        return cast(Tensor, self.classifier(z_BCHW.mean((2, 3))))


def classifier_prefix(name: str) -> str:
    """How the names of the classifier's tensors begin in a `Network` of this backbone."""
    return f"body.{find_backbone(name).classifier}."


def without_classifier(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a `Network` of this backbone, except the classifier's."""
    prefix = classifier_prefix(name)
    return {key: value for key, value in tensors.items() if not key.startswith(prefix)}


def build_network(name: str, classes: int, seed: int = 0, input_size: int = 32) -> Network:
    """A freshly initialised backbone with a classifier of K = `classes` outputs.

    Raises: InputError for a name that is not in `BACKBONES`.
    """
    backbone = find_backbone(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(name, backbone.build(classes), input_size)
