"""Weights of timm: from its own hub, from any repository of the Hugging Face hub, from files."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.packaged_weights import is_efficientnet_lite, renamed_efficientnet_lite
from partialhn.networks.timm_models import timm
from partialhn.networks.weights import Supply
from partialhn.pixels import Pixels, from_config

HUB = "hf-hub:"


def timm_supply(source: str, name: str) -> Supply:
    """The weights timm:NAME[.TAG] or hf-hub:OWNER/NAME, downloaded unless they are stored here.

    name: the network that --backbone names, without its family.

    Raises: InputError for an unknown name, another network's weights, or a failed download.
    """
    library = timm()
    model = source if source.startswith(HUB) else source.removeprefix("timm:")
    if not source.startswith(HUB):
        _check_name(library, source, model, name)
    try:
        body = library.create_model(model, pretrained=True)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise InputError(
            f"trunk {source!r} cannot be downloaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else error!r}); it needs a network. "
            "Without one: fetch the files where there is one (hf download "
            f"{_repository(library, source, model)} --local-dir FOLDER), copy the folder here and "
            "give --trunk FOLDER") from error
    network = str(body.pretrained_cfg.get("architecture", ""))
    if network != name:
        raise InputError(f"trunk {source!r} is a {network}, but backbone is 'timm:{name}'; "
                         "allowed: the same network in both, for example --backbone "
                         f"timm:{network}")
    return Supply(source, body.state_dict(), timm_pixels(body))


def timm_pixels(body: nn.Module) -> Pixels:
    """The data configuration of a network of timm: that of the weights its name stands for."""
    return from_config(timm().data.resolve_model_data_config(body), "timm")


def timm_adapt(body: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as timm wants them for this network: other programs' names renamed, position
    embeddings and patches resampled where the network is built for another size of image.
    """
    if is_efficientnet_lite(tensors):
        tensors = renamed_efficientnet_lite(tensors)
    rules = getattr(importlib.import_module(type(body).__module__), "checkpoint_filter_fn", None)
    if rules is None:
        return tensors
    with torch.no_grad():
        adapted: dict[str, Tensor] = rules(tensors, body)
    return adapted


def _check_name(library: Any, source: str, model: str, name: str) -> None:
    """Raises InputError where timm has no such weights, or they are another network's."""
    network = model.partition(".")[0]
    if not library.is_model(network):
        near = library.list_models(f"*{network}*")[:3] or library.list_models(f"{network[:6]}*")[:3]
        raise InputError(f"trunk is {source!r}, which timm does not know; allowed: a name of timm, "
                         f"for example {', '.join(f'timm:{model}' for model in near)}")
    if network != name:
        raise InputError(f"trunk is {source!r} but backbone is 'timm:{name}'; allowed: the same "
                         f"network in both, for example --backbone timm:{network}")
    known = library.list_pretrained(f"{network}.*") or library.list_pretrained(network)
    if model not in known and (model != network or not known):
        raise InputError(f"trunk is {source!r}, but timm offers "
                         + (", ".join(f"timm:{tagged}" for tagged in known) if known else
                            f"no weights for {network}; allowed: train, or a file"))


def _repository(library: Any, source: str, model: str) -> str:
    """The hub's repository that holds the weights."""
    if source.startswith(HUB):
        return source.removeprefix(HUB).partition("@")[0]
    return str(library.get_pretrained_cfg(model).hf_hub_id)


