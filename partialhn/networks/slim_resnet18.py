"""The slim ResNet-18 of the paper, for images of about 32 pixels.

Legend: B batch, C channels, H W spatial.
"""

from typing import cast

from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.backbone import Backbone
from partialhn.networks.division import residual_blocks, residual_stages


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut past them (He et al. 2016).

    A class of our own, with the names of torchvision's, because importing torchvision takes longer
    than importing torch, in every process of a cluster.
    """

    def __init__(self, width_in: int, width: int, stride: int = 1,
                 downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, z_BCHW: Tensor) -> Tensor:
        past_BCHW = z_BCHW if self.downsample is None else self.downsample(z_BCHW)
        out_BCHW = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(z_BCHW)))))
        return cast(Tensor, self.relu(out_BCHW + past_BCHW))


class SlimResNet18(nn.Module):
    """ResNet-18 with 20 base filters and a 3x3 stem of stride 1.

    The network of Lopez-Paz & Ranzato 2017, which the partial-hypernetwork paper uses. Its parts
    have the names that torchvision's ResNets use.
    """

    def __init__(self, classes: int, filters: int = 20) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, filters, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()
        self.layer1 = _two_blocks(filters, filters, 1)
        self.layer2 = _two_blocks(filters, 2 * filters, 2)
        self.layer3 = _two_blocks(2 * filters, 4 * filters, 2)
        self.layer4 = _two_blocks(4 * filters, 8 * filters, 2)
        self.fc = nn.Linear(8 * filters, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _two_blocks(width_in: int, width: int, stride: int) -> nn.Sequential:
    downsample = None
    if stride != 1 or width_in != width:
        downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False),
                                   nn.BatchNorm2d(width))
    return nn.Sequential(BasicBlock(width_in, width, stride, downsample), BasicBlock(width, width))


def _build(classes: int, input_size: int) -> SlimResNet18:
    del input_size  # a convolutional network takes any
    return SlimResNet18(classes)


SLIM_RESNET18 = Backbone(_build, residual_stages, classifier="fc")
"""The network as 0.1.0 cut it: after each of its four stages."""


def find(name: str) -> Backbone:
    """The backbone partialhn:NAME: a network of this package that can be cut at every block.

    Raises: InputError for an unknown name.
    """
    if name != "slim_resnet18":
        raise InputError(f"backbone is 'partialhn:{name}'; allowed: partialhn:slim_resnet18")
    return Backbone(_build, residual_blocks, classifier="fc")
