"""The size of image that a network's weights were trained with, from their names alone.

Nothing is downloaded or read, so a configuration is complete before any weights are there.
"""

from partialhn.networks.table import PLAIN_SIZE


def expected_size(backbone: str, trunk: str) -> int:
    """Side of the square images, in pixels, that the weights `trunk` of a backbone expect.

    Where `trunk` names no weights of the backbone's library, it is that of the weights which the
    library recommends for the backbone; without a library, or for a name that it does not know, it
    is the size of a trunk that is trained here.

    Raises: InputError where the backbone's library is not installed.
    """
    family, _, name = backbone.rpartition(":")
    if family == "timm":
        return _timm_size(name, trunk)
    return _torchvision_size(name, trunk) if family == "torchvision" else PLAIN_SIZE


def _timm_size(name: str, trunk: str) -> int:
    from partialhn.networks.timm_models import timm

    library = timm()
    weights = trunk.removeprefix("timm:") if trunk.startswith(f"timm:{name}") else name
    try:
        settings = library.get_pretrained_cfg(weights)
    except RuntimeError:  # it knows no such weights of this network, which is said later
        settings = library.get_pretrained_cfg(name)
    return int(settings.input_size[-1]) if settings else PLAIN_SIZE


def _torchvision_size(name: str, trunk: str) -> int:
    from torchvision import models  # here, because the import takes seconds

    from partialhn.networks.torchvision_weights import weights_pixels

    if name not in models.list_models(module=models):
        return PLAIN_SIZE
    kinds = models.get_model_weights(name)
    weights = trunk.rpartition(":")[2]
    return weights_pixels(kinds[weights] if weights in kinds.__members__ else kinds.DEFAULT
                          ).size or PLAIN_SIZE
