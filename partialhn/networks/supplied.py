"""Networks whose weights somebody else trained: downloaded, or from a file."""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.backbone import (
    Network,
    build_network,
    find_backbone,
    without_classifier,
)
from partialhn.networks.table import BACKBONES


def supplied_network(source: str, name: str, classes: int) -> Network:
    """A backbone whose weights somebody else trained.

    `source` is torchvision:NAME:WEIGHTS (downloaded where there is a network) or the path of a
    safetensors file with the tensors of a `Network`. The classifier is initialised anew.

    Raises: InputError for an unknown source, or one that cannot be read or does not fit.
    """
    if source.startswith("torchvision:"):
        return _pretrained_network(source, name, classes)
    if not source.endswith(".safetensors"):
        raise InputError(f"trunk is {source!r}; allowed: train, torchvision:NAME:WEIGHTS or the "
                         "path of a .safetensors file")
    try:
        tensors = load_file(source)
    except Exception as error:  # safetensors raises its own bare exception type
        raise InputError(f"trunk file {source!r} cannot be read as safetensors: {error}") from error
    network = build_network(name, classes)
    wanted, given = network.without_classifier(), without_classifier(name, tensors)
    missing, extra = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    wrong = [key for key in wanted.keys() & given.keys() if wanted[key].shape != given[key].shape]
    if missing or extra or wrong:
        raise InputError(f"trunk file {source!r} is not a {name}: "
                         f"missing {sorted(missing)[:3]}, extra {sorted(extra)[:3]}, "
                         f"of another shape {sorted(wrong)[:3]}")
    _check_numbers(source, given)
    network.load_state_dict(given, strict=False)
    return network


def _check_numbers(source: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises InputError for numbers that no trained network has, naming the tensor."""
    for key, value in sorted(tensors.items()):
        if not torch.isfinite(value.float()).all():
            raise InputError(f"tensor {key!r} of trunk file {source!r} holds NaN or infinity; "
                             "allowed: finite numbers")
        if key.endswith("running_var") and (value < 0).any():
            raise InputError(f"tensor {key!r} of trunk file {source!r} is {value.min():g} at its "
                             "least; allowed: a variance of 0 or more")


def _pretrained_network(source: str, name: str, classes: int) -> Network:
    known = [each for each in BACKBONES if find_backbone(each).pretrained]
    words = source.split(":")
    if len(words) != 3 or words[1] not in known:
        raise InputError(f"trunk is {source!r}; allowed: torchvision:NAME:WEIGHTS with NAME one of "
                         f"{', '.join(known)}, for example torchvision:resnet18:IMAGENET1K_V1")
    if words[1] != name:
        raise InputError(f"trunk is {source!r} but backbone is {name!r}; allowed: the same network "
                         f"in both, for example --backbone {words[1]}")
    backbone = find_backbone(name)
    assert backbone.pretrained is not None
    try:
        body, mean_C, std_C = backbone.pretrained(words[2])
    except OSError as error:
        raise InputError(f"trunk {source!r} cannot be downloaded ({error}); it needs a network, or "
                         "a .safetensors file in its place") from error
    network = Network(name, body)
    network.mean_C.copy_(mean_C)
    network.std_C.copy_(std_C)
    parent, _, attribute = backbone.classifier.rpartition(".")
    setattr(body.get_submodule(parent), attribute, nn.Linear(network.width, classes))
    return network
