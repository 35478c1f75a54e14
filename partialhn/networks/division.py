"""How a body that somebody else wrote is divided into blocks.

A block of a division shares its modules with the body, so weights that are loaded into the body are
the block's weights as well.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.networks.backbone import Layout

Blocks = dict[str, nn.Module]
"""Blocks by name, in order."""


class Family(NamedTuple):
    """Networks that are divided in the same way."""

    blocks: Callable[[nn.Module], Blocks]
    layout: Layout = "BCHW"
    takes_size: bool = False
    """Whether a network is built for one size of images."""


def shell(body: nn.Module, children: Iterable[str], *,
          parameters: bool | Iterable[str] = False) -> nn.Module:
    """A shallow copy of a body with some of its children alone.

    Its methods are those of the body, and so it calculates what the body calculates with them.

    Args:
        body: the module to copy; it stays as it is.
        children: names of the children to keep; names that the body lacks are left out.
        parameters: whether the body's direct parameters and buffers are kept too, or the names of
            those that are.
    """
    twin = copy.copy(body)
    own = twin.__dict__
    own["_modules"] = {name: body._modules[name] for name in children if name in body._modules}
    kept = (() if parameters is False else (*body._parameters, *body._buffers)
            if parameters is True else tuple(parameters))
    for kind in ("_parameters", "_buffers"):
        own[kind] = {name: value for name, value in getattr(body, kind).items() if name in kept}
    return twin


class Piece(nn.Module):
    """Children of a body, with the function that says how they are applied.

    Args:
        parts: the children, usually a `shell` of the body.
        apply: gives what the piece gives, from the parts and the piece's input.
    """

    def __init__(self, parts: nn.Module, apply: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.parts, self.calculate = parts, apply

    def forward(self, z: Tensor) -> Tensor:
        return self.calculate(self.parts, z)


def joined(*modules: nn.Module | None) -> nn.Module:
    """The modules one after the other, without those that are None or change nothing."""
    kept = [module for module in modules
            if module is not None and not isinstance(module, nn.Identity)]
    return kept[0] if len(kept) == 1 else nn.Sequential(*kept)


def with_ending(blocks: Blocks, ending: nn.Module) -> Blocks:
    """The blocks, the last of which goes on with `ending`."""
    last = next(reversed(blocks))
    return {**blocks, last: joined(blocks[last], ending)}


class PooledLinear(nn.Linear):
    """A linear layer that also takes pooled maps (B, F, 1, 1), as a convolution does."""

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.flatten(1))


def with_linear_classifier(body: nn.Module, name: str) -> nn.Module:
    """The same body, whose classifier is linear where it was a convolution of one pixel."""
    layer = body.get_submodule(name)
    if isinstance(layer, nn.Conv2d):
        linear = PooledLinear(layer.in_channels, layer.out_channels, layer.bias is not None,
                              device=layer.weight.device)
        linear.load_state_dict({key: value.flatten(1) if key == "weight" else value
                                for key, value in layer.state_dict().items()})
        above, _, last = name.rpartition(".")
        setattr(body.get_submodule(above), last, linear)
    return body


class Half(nn.Module):
    """Stands for one of several classifiers: what it takes, with room for what the others take.

    The mean over the classifiers, which their network calculates, is then what each one takes, side
    by side, divided by their number.
    """

    def __init__(self, place: int, count: int) -> None:
        super().__init__()
        self.place, self.count = place, count

    def forward(self, z_BF: Tensor) -> Tensor:
        width = z_BF.shape[1]
        return nn.functional.pad(z_BF, (self.place * width, (self.count - 1 - self.place) * width))


@torch.no_grad()
def with_one_classifier(body: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same body, whose first classifier stands for the mean of several linear ones.

    It takes what they take, divided by their number, side by side (as `Half` gives it), and the
    other ones are gone. With distillation, as in DeiT (Touvron et al. 2021), there are two.
    """
    layers = [cast(nn.Linear, body.get_submodule(name)) for name in names]
    one = nn.Linear(sum(layer.in_features for layer in layers), layers[0].out_features,
                    device=layers[0].weight.device)
    one.weight.copy_(torch.cat([layer.weight for layer in layers], 1))
    one.bias.copy_(torch.stack([layer.bias for layer in layers]).mean(0))
    for name, layer in zip(names, (one, *[nn.Identity() for _ in names[1:]]), strict=True):
        above, _, last = name.rpartition(".")
        setattr(body.get_submodule(above), last, layer)
    return body


def without_classifiers(body: nn.Module, children: Iterable[str],
                        names: Sequence[str]) -> nn.Module:
    """A shell of some children of a body, whose classifiers give what they take."""
    parts = shell(body, children)
    for place, name in enumerate(names):
        place_holder = nn.Identity() if len(names) == 1 else Half(place, len(names))
        _replace(parts, name, place_holder)
    return parts


def _replace(parts: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of another one; the modules above it become shells."""
    first, _, below = name.partition(".")
    if not below:
        parts._modules[first] = layer
        return
    inner = cast(nn.Module, parts._modules[first])
    twin = shell(inner, inner._modules, parameters=True)
    parts._modules[first] = twin
    _replace(twin, below, layer)


def is_classifier(layer: nn.Module | None) -> bool:
    """Whether a layer is linear in pooled features, be it as a convolution of one pixel."""
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1)


def without_chance(body: nn.Module) -> nn.Module:
    """The same body, whose dropout and stochastic depth drop nothing.

    Everything random in a run is drawn from its seeds, task and epoch; these layers draw from a
    generator that no seed of ours determines.
    """
    for module in body.modules():
        for name in ("p", "drop_prob", "dropout"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
    return body


RESIDUAL_STAGES = ("layer1", "layer2", "layer3", "layer4")


def residual_stages(body: nn.Module) -> Blocks:
    """The four stages of a ResNet as blocks; the stem belongs to the first."""
    stages = {name: cast(nn.Sequential, getattr(body, name)) for name in RESIDUAL_STAGES}
    stem = [cast(nn.Module, getattr(body, name)) for name in ("conv1", "bn1", "relu", "maxpool")]
    return {**stages, "layer1": nn.Sequential(*stem, *stages["layer1"])}


def residual_blocks(body: nn.Module) -> Blocks:
    """The stem of a ResNet, and each of its residual blocks."""
    activation = "relu" if hasattr(body, "relu") else "act1"
    blocks: Blocks = {"stem": nn.Sequential(*(
        cast(nn.Module, getattr(body, name)) for name in ("conv1", "bn1", activation, "maxpool")))}
    for stage in RESIDUAL_STAGES:
        for name, block in getattr(body, stage).named_children():
            blocks[f"{stage}.{name}"] = block
    return blocks

