"""Adaptation of a pretrained network to the first task, before its trunk is frozen.

The whole network is trained once more at a low rate, on the first task alone ("first session
adaptation", Panos et al. 2023). Its new classifier starts as ridge regression on the network's own
features: with a random one, the first steps would distort them (Kumar et al. 2022). Its batch
norms keep the statistics of the images that the weights are from: those of few images of one task
cost more accuracy than the adaptation gains (docs/measurements/pretrained.md).

Legend: N images, B batch, C channels, H W spatial, F features before the classifier, K classes.
"""

import torch
from torch import Tensor, nn

from partialhn.features.closed_form import fit_ridge
from partialhn.networks.backbone import Network, pooled

BATCH = 64


def keep_statistics(network: Network) -> None:
    """Lets batch norms use the statistics that they have, until `train()` is called again."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.eval()


@torch.no_grad()
def start_classifier(network: Network, images_NCHW: Tensor, y_N: Tensor, classes: int) -> None:
    """Sets the classifier to ridge regression on the features of uint8 images."""
    network.eval()
    features = []
    for images_BCHW in torch.split(images_NCHW, BATCH):
        z = network.normalise(images_BCHW.to(network.mean_C.device))
        for block in network.blocks().values():
            z = block(z)
        features.append(pooled(z).cpu())
    ridge = fit_ridge(torch.cat(features), y_N, classes).sharpened(y_N)
    network.classifier.weight.copy_(ridge.weight_KF)
    network.classifier.bias.copy_(ridge.bias_K)
