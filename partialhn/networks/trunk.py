"""The trunk g_phi: the first `freeze_depth` stages of a network, frozen.

Legend: B batch, C channels, H W spatial, F features before the classifier.
"""

import collections
import copy
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from partialhn.errors import InputError
from partialhn.networks.backbone import STAGE_NAMES, Network
from partialhn.networks.tensors import hash_tensors


class Trunk(nn.Module):
    """The frozen trunk g_phi: pixels to features, a function of one image alone.

    BatchNorm uses its running statistics whatever `train()` asks for, and no parameter takes a
    gradient. Takes uint8 images_BCHW, gives float32 z_BCHW; with every stage frozen the features
    are pooled to z_BF11. Depth 0 only normalises the pixels.
    """

    def __init__(self, network: Network, freeze_depth: int) -> None:
        super().__init__()
        self.name, self.freeze_depth = network.name, freeze_depth
        self.register_buffer("mean_C", network.mean_C.clone())
        self.register_buffer("std_C", network.std_C.clone())
        self.stages = nn.ModuleList(copy.deepcopy(network.stages()[:freeze_depth]))
        self.requires_grad_(False)
        self.eval()

    normalise = Network.normalise
    mean_C: Tensor
    std_C: Tensor

    def train(self, mode: bool = True) -> "Trunk":
        """Stays in evaluation mode; `mode` is what nn.Module passes and changes nothing."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor) -> Tensor:
        return collections.deque(self.outputs(images_BCHW), maxlen=1)[0][1]

    def outputs(self, images_BCHW: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(depth, z_BCHW) at depth 0 and after each stage, one pass for all: each equal, bit for
        bit, to what `upto(depth)` gives.
        """
        with torch.no_grad():
            z_BCHW = self.normalise(images_BCHW)  # type: ignore[misc]
            yield 0, z_BCHW
            for depth, stage in enumerate(self.stages, 1):
                z_BCHW = stage(z_BCHW)
                last = depth == len(STAGE_NAMES)
                yield depth, z_BCHW.mean((2, 3), keepdim=True) if last else z_BCHW

    def upto(self, freeze_depth: int) -> "Trunk":
        """The trunk of the same network at this depth or a shallower one.

        Raises: ValueError for a deeper one.
        """
        if not 0 <= freeze_depth <= self.freeze_depth:
            raise ValueError(f"a trunk of depth {self.freeze_depth} holds none of depth "
                             f"{freeze_depth}")
        if freeze_depth == self.freeze_depth:
            return self
        shallower = copy.deepcopy(self)
        shallower.stages = shallower.stages[:freeze_depth]
        shallower.freeze_depth = freeze_depth
        return shallower

    def fingerprint(self) -> str:
        """Hash of the architecture, the depth and every weight and statistic."""
        return hash_tensors({key: value for key, value in self.state_dict().items()
                             if not key.endswith("num_batches_tracked")},
                            f"{self.name}/{self.freeze_depth}")


def check_depth(name: str, freeze_depth: int) -> None:
    """Raises InputError where the backbone has no such depth."""
    if not 0 <= freeze_depth <= len(STAGE_NAMES):
        raise InputError(f"freeze_depth is {freeze_depth}; allowed: 0 (nothing frozen) to "
                         f"{len(STAGE_NAMES)} (all stages of {name})")


def head_stages(network: Network, freeze_depth: int) -> nn.Sequential:
    """The stages above the cut: what the hypernetwork generates the weights of."""
    check_depth(network.name, freeze_depth)
    return nn.Sequential(*copy.deepcopy(network.stages()[freeze_depth:]))


def split(network: Network, freeze_depth: int) -> tuple[Trunk, nn.Sequential]:
    """Cuts a network at a depth into its frozen trunk and the stages of its head.

    Raises: InputError for a depth the network does not have.
    """
    stages = head_stages(network, freeze_depth)
    return Trunk(network, freeze_depth), stages


def multiply_adds(module: nn.Module, z_BCHW: Tensor) -> int:
    """Multiply-adds of one forward pass of the module's convolutions and linear layers."""
    total = 0

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += out.numel() // out.shape[0] * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel()

    hooks = [layer.register_forward_hook(count) for layer in _leaves(module)]
    training = module.training
    module.eval()
    with torch.no_grad():
        module(z_BCHW)
    module.train(training)
    for hook in hooks:
        hook.remove()
    return total


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if not list(layer.children()))


MICRO_BATCH = 64


def run_trunk(trunk: Trunk, images_BCHW: Tensor) -> Tensor:
    """z_BCHW of uint8 images, computed in batches of one size whatever B is.

    A convolution may round differently for another batch size; with the last batch filled up, an
    image's features are the same bits in any company.
    """
    return run_trunk_at(trunk, {trunk.freeze_depth}, images_BCHW)[0][trunk.freeze_depth]


def run_trunk_at(trunk: Trunk, depths: Iterable[int],
                 images_BCHW: Tensor) -> tuple[dict[int, Tensor], dict[int, float]]:
    """z_BCHW at each depth, from one pass, and the seconds from the images to there; each as
    `run_trunk` gives it for that depth alone.
    """
    device, total = trunk.mean_C.device, len(images_BCHW)
    seconds = dict.fromkeys(depths, 0.0)
    made = {} if total else {depth: torch.empty(0, *feature_shape(trunk.upto(depth), images_BCHW))
                             for depth in seconds}
    for begin in range(0, total, MICRO_BATCH):
        start = time.perf_counter()
        chunk_BCHW = images_BCHW[begin:begin + MICRO_BATCH]
        count = len(chunk_BCHW)
        if count < MICRO_BATCH:
            chunk_BCHW = nn.functional.pad(chunk_BCHW, [0] * 7 + [MICRO_BATCH - count])
        for depth, z_BCHW in trunk.outputs(chunk_BCHW.to(device)):
            if depth in seconds:
                if depth not in made:
                    made[depth] = torch.empty(total, *z_BCHW.shape[1:])
                made[depth][begin:begin + count] = z_BCHW[:count]
                seconds[depth] += time.perf_counter() - start
            if depth == max(seconds):
                break
    return made, seconds


def feature_shape(trunk: Trunk, images_BCHW: Tensor) -> tuple[int, ...]:
    """(C, H, W) of one image's features."""
    one_BCHW = torch.zeros(1, *images_BCHW.shape[1:], dtype=torch.uint8,
                           device=trunk.mean_C.device)
    return tuple(trunk(one_BCHW).shape[1:])
