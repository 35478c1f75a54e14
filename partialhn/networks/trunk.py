"""The trunk g_phi: the first `freeze_depth` blocks of a network, frozen.

Legend: B batch, C channels, H W spatial, F features before the classifier.
"""

import collections
import copy
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from partialhn.networks.backbone import Network, named_arithmetic, pooled, to_map
from partialhn.networks.precision import arithmetic_of
from partialhn.networks.tensors import hash_tensors


class Trunk(nn.Module):
    """The frozen trunk g_phi: pixels to features, a function of one image alone.

    BatchNorm uses its running statistics whatever `train()` asks for, and no parameter takes a
    gradient. Takes uint8 images_BCHW and gives float32 z_BCHW; tokens (B, N, C) as a map (B, C, N,
    1). With every block frozen the features are pooled to z_BF11. Depth 0 only normalises the
    pixels.

    Args:
        network: the network that is cut; its normalisation of pixels is copied.
        names: names of all its blocks, in order.
        stages: copies of its first blocks, which the trunk takes over and freezes.
    """

    def __init__(self, network: Network, names: tuple[str, ...],
                 stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.name, self.freeze_depth = network.name, len(stages)
        self.input_size, self.layout = network.input_size, network.backbone.layout
        self.names = names
        """Names of all blocks of the whole network, in order."""
        self.pixels = network.pixels
        """How an image becomes the square that the trunk takes; mean and std are the buffers."""
        self.arithmetic = network.arithmetic
        """Arithmetic of its products; what it gives is float32."""
        self.register_buffer("mean_C", network.mean_C.clone())
        self.register_buffer("std_C", network.std_C.clone())
        self.stages = nn.ModuleList(stages)
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # convolutions take half the time so on a CPU
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
        """Yields (depth, z_BCHW) at depth 0 and after each block, from one pass; each equals, bit
        for bit, the features of `upto(depth)`.
        """
        with torch.no_grad():
            z = self.normalise(images_BCHW)  # type: ignore[misc]
            yield 0, z
            z = z.contiguous(memory_format=torch.channels_last)
            for depth, stage in enumerate(self.stages, 1):
                with arithmetic_of(self.arithmetic, z.device):
                    z = stage(z)
                last = pooled(z.float()) if depth == len(self.names) else z.float()
                yield depth, to_map(last, self.layout)

    def upto(self, freeze_depth: int) -> "Trunk":
        """The trunk of the same network at this depth or a shallower one.

        Raises: ValueError for a deeper one.
        """
        if not 0 <= freeze_depth <= self.freeze_depth:
            raise ValueError(f"a trunk of depth {self.freeze_depth} does not contain one of depth "
                             f"{freeze_depth}")
        if freeze_depth == self.freeze_depth:
            return self
        shallower = copy.deepcopy(self)
        shallower.stages = shallower.stages[:freeze_depth]
        shallower.freeze_depth = freeze_depth
        return shallower

    def fingerprint(self) -> str:
        """Hash of the architecture, the depth, every weight and statistic, and the arithmetic."""
        return hash_tensors({key: value for key, value in self.state_dict().items()
                             if not key.endswith("num_batches_tracked")},
                            f"{self.name}/{self.freeze_depth}"
                            + named_arithmetic(self.arithmetic))


class _Flops(TorchDispatchMode):
    """Counts operations by PyTorch's own formulas, as its `FlopCounterMode` does.

    That class imports the compiler of PyTorch, which takes four seconds of the processor.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                inner = func.decompose(*args, **kwargs)
            if inner is not NotImplemented:
                return inner
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def multiply_adds(module: nn.Module, z_BCHW: Tensor) -> int:
    """Multiply-adds of one image in a forward pass of the module: its convolutions, its linear
    layers, and the two products of attention, as PyTorch's own counter has them.
    """
    training, fast = module.training, torch.backends.mha.get_fastpath_enabled()
    module.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused layer is one that nobody counts
    with torch.no_grad(), _Flops() as counter:
        module(z_BCHW)
    torch.backends.mha.set_fastpath_enabled(fast)
    module.train(training)
    return int(counter.total) // 2 // len(z_BCHW)


MICRO_BATCH = 64
"""Largest number of images that go through the trunk together on a CPU, and wherever an answer is
asked for."""
LEAST_TOGETHER, PIXELS_TOGETHER = 4, 64 * 32 * 32
"""Fewer where images are large: so many pixels, but so many images. What a layer gives then stays
in the cache, and in memory that is not asked for anew each time."""
MOST_TOGETHER, SHARE_OF_A_GPU, BYTES_A_PIXEL = 512, 1 / 16, 64
"""Where a GPU computes features, so many images at most, and so many that the largest output takes
that share of its whole memory, at a guess of so many bytes for a pixel of the image. The memory
that is free has no say: the last bits of features depend on the batch."""


def micro_batch(side: int) -> int:
    """Images of `side` pixels that go through the trunk together: a power of two."""
    fitting = max(LEAST_TOGETHER, min(MICRO_BATCH, PIXELS_TOGETHER // side ** 2))
    return 1 << fitting.bit_length() - 1


def images_together(trunk: Trunk) -> int:
    """Images that go through the trunk together where features are stored: a power of two."""
    device, side = trunk.mean_C.device, trunk.input_size
    if device.type != "cuda":
        return micro_batch(side)
    memory = torch.cuda.get_device_properties(device).total_memory
    fitting = int(memory * SHARE_OF_A_GPU) // (BYTES_A_PIXEL * side ** 2)
    return 1 << max(MICRO_BATCH, min(MOST_TOGETHER, fitting)).bit_length() - 1


def outputs_at(trunk: Trunk, depths: Collection[int], images_BCHW: Tensor,
               together: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (depth, z_BCHW) for each of the depths, from one pass on the trunk's device.

    B is at most `together`. The batch is filled up to that number: a convolution may round
    differently for another one, and so an image's features are the same bits whatever other images
    there are.
    """
    count, deepest = len(images_BCHW), max(depths)
    if count < together:
        images_BCHW = nn.functional.pad(images_BCHW, [0] * 7 + [together - count])
    for depth, z_BCHW in trunk.outputs(images_BCHW):
        if depth in depths:
            yield depth, z_BCHW[:count]
        if depth == deepest:
            return


def run_trunk(trunk: Trunk, images_BCHW: Tensor, kept_on: torch.device | str = "cpu") -> Tensor:
    """z_BCHW of uint8 images, computed in batches of `micro_batch` whatever B is."""
    return run_trunk_at(trunk, {trunk.freeze_depth}, images_BCHW, kept_on)[0][trunk.freeze_depth]


def run_trunk_at(trunk: Trunk, depths: Iterable[int], images_BCHW: Tensor,
                 kept_on: torch.device | str = "cpu"
                 ) -> tuple[dict[int, Tensor], dict[int, float]]:
    """z_BCHW at each depth from one pass, and the seconds that each depth took from the images on,
    where the results are kept on the CPU.

    The features of a depth are the bits that `run_trunk` gives for that depth alone.
    """
    device, total = trunk.mean_C.device, len(images_BCHW)
    seconds = dict.fromkeys(depths, 0.0)
    features = {} if total else {
        depth: torch.empty(0, *feature_shape(trunk.upto(depth), images_BCHW), device=kept_on)
        for depth in seconds}
    together = micro_batch(images_BCHW.shape[2]) if device.type != "cuda" else MICRO_BATCH
    for begin in range(0, total, together):
        start = time.perf_counter()
        chunk_BCHW = images_BCHW[begin:begin + together].to(device)
        for depth, z_BCHW in outputs_at(trunk, seconds.keys(), chunk_BCHW, together):
            if depth not in features:
                features[depth] = torch.empty(total, *z_BCHW.shape[1:], device=kept_on)
            features[depth][begin:begin + len(z_BCHW)] = z_BCHW
            seconds[depth] += time.perf_counter() - start
    return features, seconds


def feature_shape(trunk: Trunk, images_BCHW: Tensor) -> tuple[int, ...]:
    """(C, H, W) of one image's features."""
    one_BCHW = torch.zeros(1, *images_BCHW.shape[1:], dtype=torch.uint8,
                           device=trunk.mean_C.device)
    return tuple(trunk(one_BCHW).shape[1:])
