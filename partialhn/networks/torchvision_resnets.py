"""torchvision's ResNets."""

import functools

from torch import nn

from partialhn.networks.backbone import Backbone
from partialhn.networks.division import residual_stages


def _build(name: str, classes: int, input_size: int) -> nn.Module:
    del input_size  # a convolutional network takes any
    from torchvision import models  # here, because the import takes seconds

    body: nn.Module = models.get_model(name, num_classes=classes)
    return body


def _resnet(name: str) -> Backbone:
    return Backbone(functools.partial(_build, name), residual_stages, classifier="fc",
                    call=f"torchvision.models.get_model('{name}', num_classes={{classes}})")


RESNET18, RESNET34, RESNET50 = _resnet("resnet18"), _resnet("resnet34"), _resnet("resnet50")
RESNET101, RESNET152 = _resnet("resnet101"), _resnet("resnet152")
