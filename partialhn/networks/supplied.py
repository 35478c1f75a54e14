"""Networks whose weights somebody else trained: downloaded, from a package, or from a file."""


import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from partialhn.errors import InputError
from partialhn.networks.backbone import Network, build_network, classifier_prefix
from partialhn.networks.packaged_weights import packaged_file
from partialhn.networks.timm_weights import timm_adapt, timm_pixels, timm_supply
from partialhn.networks.torchvision_weights import (
    torchvision_adapt,
    torchvision_pixels,
    torchvision_supply,
)
from partialhn.networks.weights import (
    NORMALISATION,
    Adapt,
    Matched,
    Supply,
    Wanted,
    match_weights,
)
from partialhn.networks.weights_file import metadata_of, read_tensors, weights_path
from partialhn.pixels import Pixels, from_config

ALLOWED = ("train, timm:NAME, hf-hub:OWNER/NAME, torchvision:NAME:WEIGHTS, "
           "package:efficientnet-lite0, or the path of a file of weights (safetensors, or a "
           "PyTorch checkpoint)")
FIRST_BACKBONES = frozenset(("slim_resnet18", "resnet18", "resnet34", "resnet50", "resnet101",
                             "resnet152"))
"""Backbones of version 0.1.0. Whatever their weights were trained with, they see the whole central
square of an image, so that stored features and registered models keep their meaning."""


def supplied_network(source: str, name: str, classes: int, input_size: int = 32) -> Network:
    """A backbone whose weights somebody else trained; its classifier is initialised anew.

    Args:
        source: timm:NAME or hf-hub:OWNER/NAME, torchvision:NAME:WEIGHTS, package:NAME, or the path
            of a file of weights or of a folder with one; FILE#PART chooses among several networks
            in a file.
        name: the backbone.
        classes: outputs K of the new classifier.
        input_size: side of the images that the network will be given, in pixels.

    The network's `notes` say what its user should know about the weights.

    Raises: InputError for an unknown source, or one that cannot be read or does not fit.
    """
    supply = _find(source, name)
    network = build_network(name, classes, input_size=input_size)
    matched = match_weights(supply, _wanted(network))
    network.body.load_state_dict(matched.tensors, strict=False)
    pixels, notes = _pixels_of(supply, matched, network)
    network.set_pixels(pixels)
    network.notes = (*matched.notes, *notes)
    return network


def _find(source: str, name: str) -> Supply:
    """The tensors that a source names, where they are for this backbone."""
    family, _, model = name.rpartition(":")
    if source.startswith(("timm:", "hf-hub:")):
        if family != "timm":
            raise InputError(f"trunk is {source!r} but backbone is {name!r}; allowed: a backbone "
                             "of timm, --backbone timm:NAME")
        return timm_supply(source, model)
    if source.startswith("torchvision:"):
        return torchvision_supply(source, name.removeprefix("torchvision:"))
    if source.startswith("package:"):
        path = packaged_file(source, name.removeprefix("timm:"))
        return Supply(source, read_tensors(path))
    return _from_file(source)


def _from_file(source: str) -> Supply:
    path, part = weights_path(source), ""
    if path is None and "#" in source:
        text, _, part = source.rpartition("#")
        path = weights_path(text)
    if path is None:
        missing = Path(source.rpartition("#")[0] or source)
        why = ("is a folder without model.safetensors or pytorch_model.bin" if missing.is_dir()
               else "is no file")
        raise InputError(f"trunk is {source!r}, which {why}; allowed: {ALLOWED}")
    return Supply(source, read_tensors(path), _pixels_inside(path) or _pixels_beside(path), part)


def _pixels_inside(path: Path) -> Pixels | None:
    """The pixels in the record of a file that `partialhn export` wrote; None for another file.

    Raises: InputError for a record that cannot be used.
    """
    try:
        record = json.loads(metadata_of(path)["partialhn"])
        steps = record["preprocessing"]
        fields = {key: steps[key] for key in
                  ("size", "interpolation", "crop", "squash", "mean", "std")}
    except (KeyError, TypeError, ValueError):
        return None
    return Pixels.from_fields(fields)


def _pixels_beside(path: Path) -> Pixels | None:
    """The data configuration in the config.json beside a file of weights, as model hubs have it.

    Raises: InputError for one that cannot be used.
    """
    file = path.parent / "config.json"
    try:
        values: Any = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None  # there is none, or it is another program's
    settings = values.get("pretrained_cfg") if isinstance(values, Mapping) else None
    return from_config(settings, str(file)) if isinstance(settings, Mapping) else None


def _wanted(network: Network) -> Wanted:
    prefix = classifier_prefix(network.name).removeprefix("body.")
    replaced = (f"{name}." for name in network.backbone.replaced)
    return Wanted(network.name, network.body.state_dict(), (prefix, *replaced), _adapt(network))


def _adapt(network: Network) -> Adapt:
    """How the network's library renames and resamples tensors."""
    module = type(network.body).__module__
    if module.startswith("timm."):
        return functools.partial(timm_adapt, network.body)
    if module.startswith("torchvision."):
        return functools.partial(torchvision_adapt, network.body)
    return dict


def _pixels_of(supply: Supply, matched: Matched,
               network: Network) -> tuple[Pixels, tuple[str, ...]]:
    """The pixels that the weights expect, and what should be said about them."""
    own = _own_normalisation(supply, matched)
    if own is not None:  # a network that was trained here saw plain squares
        return own, ()
    pixels = supply.pixels
    notes: tuple[str, ...] = ()
    if pixels is None:
        pixels = _family_pixels(network)
        if not supply.source.startswith("package:"):
            notes = (f"trunk {supply.source!r} does not say which pixels it was trained with; "
                     f"taken: {pixels.described()}",)
    if network.name in FIRST_BACKBONES:
        return Pixels(mean=pixels.mean, std=pixels.std), notes
    if pixels.size not in (None, network.input_size):
        notes = (*notes, f"input_size is {network.input_size}, but the weights of trunk "
                         f"{supply.source!r} expect {pixels.size} pixels; smaller images are "
                         "cheaper and usually less accurate")
    return pixels, notes


def _own_normalisation(supply: Supply, matched: Matched) -> Pixels | None:
    """The normalisation in a file that this package wrote; None for a file of others.

    Raises: InputError for a file of this package without it, or with numbers that are none.
    """
    if not f".{matched.prefix}".endswith(".body."):
        return None
    outer = matched.prefix.removesuffix("body.")
    missing = [f"{outer}{key}" for key in NORMALISATION if f"{outer}{key}" not in supply.tensors]
    if missing:
        raise InputError(f"trunk {supply.source!r} is missing {missing}: the mean and the spread "
                         "of its pixels")
    mean, std = (_three(supply.tensors[f"{outer}{key}"]) for key in NORMALISATION)
    try:
        return Pixels(mean=mean, std=std)
    except InputError as error:
        raise InputError(f"trunk {supply.source!r}: {error}") from error


def _three(value_C: Tensor) -> Any:
    return tuple(value_C.float().flatten().tolist())


def _family_pixels(network: Network) -> Pixels:
    """The pixels of the weights that a network's library recommends."""
    module, model = type(network.body).__module__, network.name.rpartition(":")[2]
    if module.startswith("timm."):
        return timm_pixels(network.body)
    return torchvision_pixels(model) if module.startswith("torchvision.") else Pixels()
