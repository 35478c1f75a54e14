"""torchvision's ResNets, with the weights that torchvision offers for them."""

import functools

import torch
from torch import nn

from partialhn.errors import InputError
from partialhn.networks.backbone import RESNET_STAGES, Backbone, resnet_stages
from partialhn.networks.pixels import Pretrained


def _build(name: str, classes: int) -> nn.Module:
    from torchvision import models  # here, because the import takes seconds

    body: nn.Module = models.get_model(name, num_classes=classes)
    return body


def _pretrained(name: str, weights: str) -> Pretrained:
    from torchvision import models  # here, because the import takes seconds

    kinds = models.get_model_weights(name)
    if weights not in kinds.__members__:
        raise InputError(f"trunk weights {weights!r} of {name} are unknown; allowed: "
                         f"{', '.join(kinds.__members__)}")
    body = models.get_model(name, weights=kinds[weights])
    transform = kinds[weights].transforms()
    return Pretrained(body, torch.tensor(transform.mean), torch.tensor(transform.std))


def _resnet(name: str) -> Backbone:
    return Backbone(functools.partial(_build, name), RESNET_STAGES, resnet_stages, classifier="fc",
                    pretrained=functools.partial(_pretrained, name))


RESNET18, RESNET34, RESNET50 = _resnet("resnet18"), _resnet("resnet34"), _resnet("resnet50")
RESNET101, RESNET152 = _resnet("resnet101"), _resnet("resnet152")
