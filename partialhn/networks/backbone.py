"""The backbones: a whole network as a list of stages.

Legend: B batch, C channels, H W spatial, F features before the classifier, K classes.
"""

from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from partialhn.errors import InputError

STAGE_NAMES = ("layer1", "layer2", "layer3", "layer4")
SLIM = "slim_resnet18"
TORCHVISION_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BACKBONES = (SLIM, *TORCHVISION_RESNETS)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a way past them (He et al. 2016).

    Its own class, with the names of torchvision's, because importing torchvision takes longer than
    importing torch, in every process of a cluster.
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
    """ResNet-18 with 20 base filters and a 3x3 stem of stride 1, for images of about 32 pixels.

    The network of Lopez-Paz & Ranzato 2017, used by the partial-hypernetwork paper. Its parts have
    the names that torchvision's ResNets use.
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


class Network(nn.Module):
    """A whole backbone: normalisation of the pixels, four stages, pooling and a classifier.

    Takes uint8 images_BCHW (C = 3, any size) and gives logits_BK. `mean_C` and `std_C` are in
    units of a pixel scaled to 0..1.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, name: str, body: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.body = body
        self.register_buffer("mean_C", torch.tensor([0.485, 0.456, 0.406]))
        self.register_buffer("std_C", torch.tensor([0.229, 0.224, 0.225]))

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """uint8 pixels to float32 of about zero mean and unit variance."""
        return (images_BCHW.float() / 255 - self.mean_C[:, None, None]) / self.std_C[:, None, None]

    def stages(self) -> list[nn.Sequential]:
        """The four stages in order; the stem belongs to the first."""
        body = self.body
        blocks = [cast(nn.Sequential, getattr(body, name)) for name in STAGE_NAMES]
        stem = (body.conv1, body.bn1, body.relu, body.maxpool)
        return [nn.Sequential(*cast(tuple[nn.Module, ...], stem), *blocks[0]), *blocks[1:]]

    @property
    def width(self) -> int:
        """Features F that the classifier sees."""
        return cast(nn.Linear, self.body.fc).in_features

    def forward(self, images_BCHW: Tensor) -> Tensor:
        z_BCHW = self.normalise(images_BCHW)
        for stage in self.stages():
            z_BCHW = stage(z_BCHW)
        return cast(Tensor, cast(nn.Linear, self.body.fc)(z_BCHW.mean((2, 3))))


def build_network(name: str, classes: int, seed: int = 0) -> Network:
    """A freshly initialised backbone with a classifier of K = `classes` outputs.

    Raises: InputError for a name that is not in `BACKBONES`.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone is {name!r}; allowed: {', '.join(BACKBONES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(name, SlimResNet18(classes) if name == SLIM
                       else _torchvision_body(name, classes))


def _torchvision_body(name: str, classes: int) -> nn.Module:
    from torchvision import models  # here: seconds

    body: nn.Module = models.get_model(name, num_classes=classes)
    return body


def supplied_network(source: str, name: str, classes: int) -> Network:
    """A backbone whose weights somebody else trained.

    `source` is torchvision:NAME:WEIGHTS (downloaded where there is a network) or the path of a
    safetensors file with the tensors of a `Network`. The classifier is made anew.

    Raises: InputError for an unknown source, one that cannot be had, or one that does not fit.
    """
    if source.startswith("torchvision:"):
        return _torchvision_network(source, name, classes)
    if not source.endswith(".safetensors"):
        raise InputError(f"trunk is {source!r}; allowed: train, torchvision:NAME:WEIGHTS or the "
                         "path of a .safetensors file")
    try:
        found = load_file(source)
    except Exception as error:  # safetensors raises its own bare exception type
        raise InputError(f"trunk file {source!r} cannot be read as safetensors: {error}") from error
    network = build_network(name, classes)
    wanted = {key: value for key, value in network.state_dict().items()
              if not key.startswith("body.fc.")}
    given = {key: value for key, value in found.items() if not key.startswith("body.fc.")}
    missing, extra = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    wrong = [key for key in wanted.keys() & given.keys() if wanted[key].shape != given[key].shape]
    if missing or extra or wrong:
        raise InputError(f"trunk file {source!r} is not a {name}: "
                         f"missing {sorted(missing)[:3]}, extra {sorted(extra)[:3]}, "
                         f"of another shape {sorted(wrong)[:3]}")
    network.load_state_dict(given, strict=False)
    return network


def _torchvision_network(source: str, name: str, classes: int) -> Network:
    parts = source.split(":")
    if len(parts) != 3 or parts[1] not in TORCHVISION_RESNETS:
        raise InputError(f"trunk is {source!r}; allowed: torchvision:NAME:WEIGHTS with NAME one of "
                         f"{', '.join(TORCHVISION_RESNETS)}, for example "
                         "torchvision:resnet18:IMAGENET1K_V1")
    if parts[1] != name:
        raise InputError(f"trunk is {source!r} but backbone is {name!r}; allowed: the same network "
                         f"in both, for example --backbone {parts[1]}")
    from torchvision import models  # here: seconds

    kinds = models.get_model_weights(name)
    if parts[2] not in kinds.__members__:
        raise InputError(f"trunk weights {parts[2]!r} of {name} are unknown; allowed: "
                         f"{', '.join(kinds.__members__)}")
    weights = kinds[parts[2]]
    try:
        body = models.get_model(name, weights=weights)
    except OSError as error:
        raise InputError(f"trunk {source!r} cannot be downloaded ({error}); it needs a network, or "
                         "a .safetensors file in its place") from error
    transform = weights.transforms()
    network = Network(name, body)
    network.mean_C.copy_(torch.tensor(transform.mean))
    network.std_C.copy_(torch.tensor(transform.std))
    body.fc = nn.Linear(network.width, classes)
    return network
