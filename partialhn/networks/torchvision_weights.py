"""Weights of torchvision: downloaded by name, and fitted to another size of image.

Legend: N tokens, C channels.
"""

from typing import Any

from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.weights import Supply
from partialhn.pixels import Pixels, from_config


def torchvision_supply(source: str, name: str) -> Supply:
    """The weights torchvision:NAME:WEIGHTS, downloaded unless they are stored here.

    name: the network that --backbone names, without its family.

    Raises: InputError for an unknown name, another network's weights, or a failed download.
    """
    from torchvision import models  # here, because the import takes seconds

    words = source.split(":")
    if len(words) != 3 or words[1] not in models.list_models(module=models):
        raise InputError(f"trunk is {source!r}; allowed: torchvision:NAME:WEIGHTS with a name of a "
                         "torchvision classifier, for example torchvision:resnet18:IMAGENET1K_V1")
    if words[1] != name:
        raise InputError(f"trunk is {source!r} but backbone is {name!r}; allowed: the same network "
                         f"in both, for example --backbone {words[1]}")
    kinds = models.get_model_weights(name)
    if words[2] not in kinds.__members__:
        raise InputError(f"trunk weights {words[2]!r} of {name} are unknown; allowed: "
                         f"{', '.join(kinds.__members__)}")
    try:
        body = models.get_model(name, weights=kinds[words[2]])
    except OSError as error:
        raise InputError(
            f"trunk {source!r} cannot be downloaded ({error}); it needs a network. Without one: "
            f"fetch {kinds[words[2]].url} where there is one, copy the file here and give "
            "--trunk FILE") from error
    return Supply(source, body.state_dict(), weights_pixels(kinds[words[2]]))


def torchvision_pixels(name: str) -> Pixels:
    """The data configuration of the weights that torchvision recommends for a network."""
    from torchvision import models

    return weights_pixels(models.get_model_weights(name).DEFAULT)


def torchvision_adapt(body: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the position embeddings of a transformer resampled for the network's size
    of image, by torchvision's own function.
    """
    key, wanted = "encoder.pos_embedding", body.state_dict()
    if key not in wanted or key not in tensors or wanted[key].shape == tensors[key].shape:
        return tensors
    from torchvision.models.vision_transformer import interpolate_embeddings

    parts: Any = body
    adapted: dict[str, Tensor] = interpolate_embeddings(parts.image_size, parts.patch_size,
                                                        {**tensors})
    return adapted


def weights_pixels(weights: Any) -> Pixels:
    """The resizing and normalisation that torchvision applies before a network with these weights.

    It makes the shorter side `resize_size` long and takes the central `crop_size`.
    """
    steps = weights.transforms()
    return from_config({"input_size": (3, steps.crop_size[0], steps.crop_size[0]),
                        "crop_pct": min(1.0, steps.crop_size[0] / steps.resize_size[0]),
                        "interpolation": steps.interpolation.value,
                        "mean": steps.mean, "std": steps.std}, str(weights))
