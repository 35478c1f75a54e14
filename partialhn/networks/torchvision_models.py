"""The backbones torchvision:NAME: torchvision's classifiers, cut at every block.

Legend: B batch, C channels, H W spatial, N tokens, F features before the classifier.
"""

import difflib
import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.backbone import Backbone
from partialhn.networks.division import (
    Blocks,
    Family,
    Piece,
    joined,
    residual_blocks,
    shell,
    with_ending,
    without_chance,
)


def _feature_blocks(features: nn.Sequential) -> Blocks:
    """The blocks of a `features` attribute: its first child is the stem. A Sequential of equal
    modules is a stage of blocks; what makes a map smaller belongs to the block after it.
    """
    blocks: Blocks = {}
    before: list[nn.Module] = []
    for name, child in features.named_children():
        kinds = {type(module) for module in child.children()}
        if not blocks:
            blocks["stem"] = child
        elif type(child) is nn.Sequential and len(kinds) == 1:
            for index, block in child.named_children():
                blocks[f"features.{name}.{index}"] = joined(*before, block)
                before = []
        elif type(child) is nn.Sequential or type(child).__name__.startswith("PatchMerging"):
            before = [child]
        else:
            blocks[f"features.{name}"] = child
    return blocks


def _convolutional(body: nn.Module) -> Blocks:
    """EfficientNet, MobileNet and ConvNeXt: what stands before the classifier's last layer belongs
    to the last block.
    """
    classifier = cast(nn.Sequential, body.classifier)
    before = [module for module in list(classifier.children())[:-1]
              if not isinstance(module, nn.Dropout)]
    pool = getattr(body, "avgpool", None) or nn.AdaptiveAvgPool2d(1)
    ending: list[nn.Module] = [pool, *before]
    if not any(isinstance(module, nn.Flatten) for module in before):
        ending.insert(1, nn.Flatten(1))
    return with_ending(_feature_blocks(cast(nn.Sequential, body.features)), joined(*ending))


def _swin(body: nn.Module) -> Blocks:
    ending = joined(*(cast(nn.Module, getattr(body, name))
                      for name in ("norm", "permute", "avgpool", "flatten")))
    return with_ending(_feature_blocks(cast(nn.Sequential, body.features)), ending)


def _vit_stem(parts: Any, images_BCHW: Tensor) -> Tensor:
    z_BNC = parts._process_input(images_BCHW)
    z_BNC = torch.cat([parts.class_token.expand(z_BNC.shape[0], -1, -1), z_BNC], dim=1)
    return cast(Tensor, z_BNC + parts.encoder.pos_embedding)


def _vit_end(parts: Any, z_BNC: Tensor) -> Tensor:
    return cast(Tensor, parts.ln(z_BNC)[:, 0])


def _vit(body: nn.Module) -> Blocks:
    encoder = cast(nn.Module, body.encoder)
    first = shell(body, ["conv_proj"], parameters=True)
    first._modules["encoder"] = shell(encoder, [], parameters=True)
    blocks: Blocks = {"stem": Piece(first, _vit_stem)}
    for name, block in cast(nn.Module, encoder.layers).named_children():
        blocks[f"encoder.layers.{name}"] = block
    return with_ending(blocks, Piece(shell(encoder, ["ln"]), _vit_end))


FAMILIES = {
    "resnet": (Family(residual_blocks), "fc"),
    "resnext": (Family(residual_blocks), "fc"),
    "wide_resnet": (Family(residual_blocks), "fc"),
    "convnext": (Family(_convolutional), "classifier.2"),
    "efficientnet": (Family(_convolutional), "classifier.1"),
    "mobilenet_v2": (Family(_convolutional), "classifier.1"),
    "mobilenet_v3": (Family(_convolutional), "classifier.3"),
    "swin": (Family(_swin, "BHWC"), "head"),
    "vit": (Family(_vit, "BNC", takes_size=True), "heads.head"),
}
"""How the networks whose names begin so are divided, and the attribute of their classifier."""


def known() -> list[str]:
    """Names of the networks that can be cut."""
    from torchvision import models  # here, because the import takes seconds

    return [name for name in models.list_models(module=models) if _family(name)]


def find(name: str) -> Backbone:
    """The backbone torchvision:NAME. Raises: InputError for a name that cannot be cut."""
    line = _family(name)
    if line is None or name not in known():
        near = difflib.get_close_matches(name, known(), 3) or known()[:3]
        raise InputError(f"backbone is 'torchvision:{name}'; allowed: a classifier of torchvision "
                         f"of the families {', '.join(FAMILIES)}, such as {', '.join(near)}")
    family, classifier = line
    size = ", image_size={size}" if family.takes_size else ""
    return Backbone(
        functools.partial(_build, name, family.takes_size), family.blocks, classifier,
        family.layout, f"torchvision.models.get_model('{name}', num_classes={{classes}}{size})")


def _family(name: str) -> tuple[Family, str] | None:
    prefixes = [prefix for prefix in FAMILIES if name.startswith(prefix)]
    return FAMILIES[max(prefixes, key=len)] if prefixes else None


def _build(name: str, takes_size: bool, classes: int, input_size: int) -> nn.Module:
    from torchvision import models

    options: dict[str, int] = {"image_size": input_size} if takes_size else {}
    try:
        body = models.get_model(name, num_classes=classes, **options)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise InputError(f"backbone torchvision:{name} cannot be built for input_size "
                         f"{input_size}: {error}; allowed: a multiple of its patches") from error
    return without_chance(body)
