"""The head h_omega: the blocks above the cut as a function of weights that it does not own.

A tensor of the blocks belongs to one of three kinds. *Matrices* are the weights of convolutions
and linear layers, attention's projections included; the hypernetwork generates them, or those of
them that the option `generate` names. *Vectors* belong to each task: scales and shifts of norms,
biases, layer scales. Everything else stays as the network has it: matrices that are not generated,
tables of positions, and constants such as a window's mask.

Legend: B batch, C channels, H W spatial, F features before the classifier, K classes.
"""

import copy
import fnmatch
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.config import BATCH_NORMS, Norm, Precision
from partialhn.errors import InputError
from partialhn.networks.backbone import (
    Layout,
    from_map,
    laid_out,
    pooled,
    prefers_channels_last,
    to_map,
)
from partialhn.networks.columns import kernel_layout
from partialhn.networks.cut import CutNetwork, skeleton
from partialhn.networks.draws import seeded
from partialhn.networks.hypernet import GeneratedTensor
from partialhn.networks.precision import autocast_to


class EarlierWeights(NamedTuple):
    """What a classifier makes of features before the last block's: weight_KE weighs the mean of
    each channel of the trunk's features, then of what some `blocks` give.

    blocks: their numbers above the cut.
    """

    weight_KE: Tensor
    blocks: tuple[int, ...]


class HeadWeights(NamedTuple):
    """All weights of a head for one task: omega_t. N channels that batch norm normalises.

    matrices: by name, generated or owned. norm: the task's vectors as one: all scales of the N
    channels, then all their shifts, then the other vectors. classifier_KF and bias_K: the task's
    own. statistics: running means, then variances, 2 N, while a task is learned with batch norm;
    None where they are folded into `norm`, and for the other norms. earlier: the classifier's part
    for earlier features, if it sees any; such a head is not trained.
    """

    matrices: dict[str, Tensor]
    norm: Tensor
    classifier_KF: Tensor
    bias_K: Tensor
    statistics: Tensor | None = None
    earlier: EarlierWeights | None = None

    @property
    def whole_classifier(self) -> Tensor:
        """The classifier with its part for earlier features behind it, (K, F + E)."""
        return (self.classifier_KF if self.earlier is None
                else torch.cat([self.classifier_KF, self.earlier.weight_KE], 1))


class HeadStart(NamedTuple):
    """The weights of a head before its first step: matrices in its order, and norm.

    statistics: running means, then variances, of the network's own batch norms (none where it has
    no batch norm); None where the weights are not the network's own.
    """

    matrices: list[Tensor]
    norm: Tensor
    statistics: Tensor | None = None


class TaskBatchNorm(nn.Module):
    """Batch norm whose statistics belong to a task, and an affine map once they are folded.

    While a task is learned it uses the batch's statistics and updates the running ones. Otherwise
    it uses the running ones, so the logits of an image depend on no other image.
    """

    MOMENTUM = 0.1

    def __init__(self, channels: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, z_BCHW: Tensor) -> Tensor:
        return nn.functional.batch_norm(z_BCHW, self.get_buffer("mean"),
                                        self.get_buffer("variance"), self.weight, self.bias,
                                        self.training, self.MOMENTUM, self.epsilon)


class Head(nn.Module):
    """Applies the later blocks, pooling and a classifier to features, with the weights given.

    One set of weights serves a whole batch, and once a task is learned the logits of an image
    depend on no other image. A head holds no parameter: its skeleton lives on the meta device. What
    stays as the network has it are buffers, and a checkpoint holds those that the network's own
    checkpoint would. Where every block is frozen the head is linear: pooled features, standardised
    by a task's batch norm whatever `norm` says (the others need more than one pixel), and a
    classifier.

    Args:
        cut: the network whose later blocks give the head its shapes.
        norm: normalisation that replaces the network's batch norms.
        norm_groups: channel groups of norm group.
        precision: number type of matrices and norms while training; logits are float32.
        generate: which matrices the hypernetwork generates: all, attention, mlp, or a pattern of
            their names such as *.qkv.*

    Raises: InputError where `norm_groups` does not divide every width in the head, or `generate`
        names no matrix in it.
    """

    def __init__(self, cut: CutNetwork, norm: Norm, norm_groups: int,
                 precision: Precision = "float32", generate: str = "all") -> None:
        super().__init__()
        self.width, self.precision, self._layout = cut.width, precision, cut.feature_layout
        self.passed_on = cut.layout
        """Order of the dimensions of what the blocks give. They take pixels as maps in any case."""
        self._at_pixels, self.is_linear = not len(cut.trunk.stages), False
        self._feature_channels = cut.channels
        self._channels_last = self._layout == "BCHW" and prefers_channels_last(cut.stages)
        self.matrices: tuple[GeneratedTensor, ...] = ()
        if not len(cut.stages):
            self._become_linear(cut.width)
            return
        blocks = skeleton(cut.stages)
        _replace_norms(blocks, norm, norm_groups)
        self.matrices = tuple(GeneratedTensor(name, tuple(value.shape))
                              for name, value in chosen_matrices(cut, generate))
        layers = {name: layer for name, layer in blocks.named_modules()
                  if isinstance(layer, TaskBatchNorm | nn.GroupNorm)
                  and layer.__dict__.get("replaced")}
        widths = [len(cast(Tensor, layer.weight)) for layer in layers.values()]
        norms = _names(layers, "weight", "bias")
        not_vectors = {*norms, *(name for name, _ in matrices(cut.stages))}
        vectors = [(name, value) for name, value in blocks.named_parameters()
                   if name not in not_vectors and is_vector(value)]
        self._set_vectors([*norms, *(name for name, _ in vectors)],
                          [*((width,) for width in widths * 2),
                           *(tuple(value.shape) for _, value in vectors)])
        batch = [layer for layer in layers.values() if isinstance(layer, TaskBatchNorm)]
        self._set_statistics(_names(layers, "mean", "variance") if batch else [], widths,
                             [layer.epsilon for layer in batch])
        if norm == "network" and self.matrices:
            self.register_buffer("network_statistics", running_statistics(cut.stages),
                                 persistent=False)
        taken = {*self._vector_names, *(tensor.name for tensor in self.matrices)}
        self._keep(cut.stages, {name for name, _ in blocks.named_parameters()} - taken, blocks)
        # kept from nn.Module's registry: the skeleton's parameters are nobody's weights
        self.__dict__["_skeleton"] = blocks.to("meta")  # the new norms are on the CPU

    def _set_vectors(self, names: list[str], shapes: list[tuple[int, ...]]) -> None:
        self._vector_names, self._vector_shapes = names, shapes
        self._vector_sizes = [torch.Size(shape).numel() for shape in shapes]

    def _set_statistics(self, names: list[str], widths: list[int], epsilons: list[float]) -> None:
        """The tensors of batch norms' statistics: their names, N widths and epsilons."""
        self._statistic_names, self._statistic_widths = names, widths
        if names:
            self.register_buffer("epsilons", torch.cat([
                torch.full((width,), epsilon) for width, epsilon
                in zip(widths, epsilons, strict=True)]), persistent=False)

    def _keep(self, source: nn.Sequential, parameters: set[str], blocks: nn.Module) -> None:
        """Keeps what belongs to no task as buffers: some parameters, and the network's buffers."""
        self._kept: list[tuple[str, str]] = []
        own = dict(source.named_parameters())
        wanted = {name for name, _ in blocks.named_buffers()} - {*self._statistic_names}
        saved = source.state_dict().keys()
        values = ({name: value.detach() for name, value in own.items() if name in parameters}
                  | {name: value for name, value in source.named_buffers() if name in wanted})
        for name, value in values.items():
            buffer = "kept_" + name.replace(".", "_")
            self.register_buffer(buffer, value.clone(), persistent=name in saved)
            self._kept.append((name, buffer))

    def train(self, mode: bool = True) -> "Head":
        """Batch norm of maps uses the batch's own statistics while training, unless the head
        `keeps_statistics`.

        Batch norm of vectors, which some networks have before the classifier, keeps the network's
        statistics: they belong to no task.
        """
        kept = ((nn.BatchNorm1d, TaskBatchNorm) if self.keeps_statistics else (nn.BatchNorm1d,))
        for layer in self.blocks.train(mode).modules():
            if isinstance(layer, kept):
                layer.eval()
        return super().train(mode)

    @property
    def keeps_statistics(self) -> bool:
        """Whether a task is learned with the network's own batch norm statistics."""
        return "network_statistics" in self._buffers

    @property
    def at_pixels(self) -> bool:
        """Whether nothing is frozen, so that features are images."""
        return self._at_pixels

    def without_stages(self) -> "Head":
        """A linear head over the same features: pooling, a task's batch norm, a classifier."""
        bare = copy.copy(self)
        bare.__dict__ |= {"_buffers": {}, "_non_persistent_buffers_set": set()}
        bare._become_linear(self._feature_channels)
        return bare

    def _become_linear(self, width: int) -> None:
        self.width, self.matrices, self._layout, self.is_linear = width, (), "BCHW", True
        self._kept = []
        self._set_vectors(_names(["1"], "weight", "bias"), [(width,), (width,)])
        norm = TaskBatchNorm(width)
        self._set_statistics(_names(["1"], "mean", "variance"), [width], [norm.epsilon])
        self.__dict__["_skeleton"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), norm).to("meta")

    @property
    def norm_length(self) -> int:
        """Length of a task's vectors: scales and shifts of norms, biases and layer scales."""
        return sum(self._vector_sizes)

    @property
    def weight_count(self) -> int:
        """Number of weights in the matrices of one task's head."""
        return sum(tensor.rows * tensor.row_length for tensor in self.matrices)

    def named(self, matrices: Iterable[Tensor]) -> dict[str, Tensor]:
        """Matrices by name, given in the head's order."""
        names = [tensor.name for tensor in self.matrices]
        return dict(zip(names, matrices, strict=True))

    def first_statistics(self) -> Tensor | None:
        """Means, then variances, for a task about to be learned with batch norm: zero and one, or
        the network's own.
        """
        if not self._statistic_names:
            return None
        if self.keeps_statistics:
            return self.get_buffer("network_statistics").clone()
        return _halves(0.0, 1.0, 2 * sum(self._statistic_widths))

    def fold(self, norm: Tensor, statistics: Tensor) -> Tensor:
        """The vectors whose scales and shifts alone equal batch norm with these statistics."""
        count = len(statistics) // 2
        scale, shift, others = torch.split(norm, [count, count, len(norm) - 2 * count])
        mean, variance = statistics.chunk(2)
        # a network's own statistics may be on the host still
        folded = scale / (variance + self.get_buffer("epsilons").to(variance)).sqrt()
        return torch.cat([folded, shift - folded * mean, others])

    @property
    def blocks(self) -> nn.Module:
        """The blocks' structure on the meta device, without their numbers."""
        return cast(nn.Module, self.__dict__["_skeleton"])

    def side(self, weights: HeadWeights) -> int:
        """Cells along each side of a feature map that weights without vectors see."""
        return math.isqrt(weights.classifier_KF.shape[1] // self._feature_channels)

    def tensors(self, weights: HeadWeights) -> dict[str, Tensor]:
        """Every tensor of `blocks` by name, with one task's weights in place."""
        parts = torch.split(weights.norm, self._vector_sizes)
        tensors = weights.matrices | {
            name: part.view(shape) for name, shape, part
            in zip(self._vector_names, self._vector_shapes, parts, strict=True)}
        for name, buffer in self._kept:
            tensors[name] = self.get_buffer(buffer)
        if self._statistic_names:
            statistics = weights.statistics
            if statistics is None:  # what normalises nothing: means of 0, variances of 1
                one_less = 1.0 - self.get_buffer("epsilons").to(weights.norm)
                statistics = torch.cat([torch.zeros_like(one_less), one_less])
            parts = torch.split(statistics, self._statistic_widths * 2)
            tensors |= dict(zip(self._statistic_names, parts, strict=True))
        return tensors

    def embed(self, z_BCHW: Tensor, weights: HeadWeights) -> Tensor:
        """Features to pooled features of the last block, (B, F); for weights without vectors,
        to cells of the features themselves.
        """
        if not len(weights.norm):
            return nn.functional.adaptive_avg_pool2d(z_BCHW, self.side(weights)).flatten(1)
        tensors = self.tensors(weights)
        blocks = self.blocks
        precision = self.precision if self.training and self.matrices else "float32"
        if self.training and self.rounds:  # of a network of maps
            layout = kernel_layout(z_BCHW.device)
            z, tensors = Rounded.apply(z_BCHW, layout), tensors | {
                name: Rounded.apply(value, layout) for name, value in weights.matrices.items()
                if value.dim() == 4 and value.dtype != torch.bfloat16}
        else:
            z = self.taken(z_BCHW)
        with autocast_to(precision, z_BCHW.device):
            z = cast(Tensor, torch.func.functional_call(blocks, tensors, (z,), strict=True))
        if z.dim() == 4 and z.dtype == torch.bfloat16:
            return cast(Tensor, Pooled.apply(z))
        return pooled(z.to(weights.classifier_KF.dtype))

    def taken(self, z_BCHW: Tensor) -> Tensor:
        """Features as the first block takes them."""
        return laid_out(from_map(z_BCHW, self._layout), self._channels_last)

    @property
    def rounds(self) -> bool:
        """Whether maps and kernels are rounded to bfloat16 before the blocks run while training."""
        return self.precision == "bfloat16" and bool(self.matrices) and self._layout == "BCHW"

    def forward(self, z_BCHW: Tensor, weights: HeadWeights) -> Tensor:
        """Features z_BCHW to logits_BK with one task's weights."""
        if weights.earlier is None:
            x_BF = self.embed(z_BCHW, weights)
        else:
            blocks = EveryBlock(self.blocks, self._layout, self.passed_on, weights.earlier.blocks)
            x_BF = torch.func.functional_call(blocks, {
                f"blocks.{name}": value for name, value in self.tensors(weights).items()},
                (self.taken(z_BCHW),), strict=True)
        return nn.functional.linear(x_BF, weights.whole_classifier, weights.bias_K)


class EveryBlock(nn.Module):
    """What a classifier with a part for earlier features sees (`EarlierWeights`): the features of
    the last block, the means of the trunk's channels, then those of some blocks.

    Args:
        blocks: the blocks of a head.
        before: order of the dimensions of what they take.
        between: order of the dimensions of what each of them gives.
        chosen: the numbers of the blocks.
    """

    def __init__(self, blocks: nn.Module, before: Layout, between: Layout,
                 chosen: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = blocks
        self._before, self._between, self._chosen = before, between, chosen

    def forward(self, z: Tensor) -> Tensor:
        """(B, F + E), from features in the layout `before`."""
        means = [to_map(z, self._before).mean((2, 3))]
        for number, block in enumerate(cast(nn.Sequential, self.blocks)):
            z = block(z)
            if number in self._chosen:
                means.append(to_map(z, self._between).mean((2, 3)))
        return torch.cat([pooled(z), *means], 1)


class Rounded(torch.autograd.Function):
    """x_BCHW in bfloat16 and a layout; the gradient has the type and layout of x_BCHW."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, layout: torch.memory_format) -> Tensor:
        ctx.dtype = x_BCHW.dtype
        return x_BCHW.to(torch.bfloat16, memory_format=layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype, memory_format=torch.contiguous_format), None


class Pooled(torch.autograd.Function):
    """Maps in bfloat16 to their means in float32 (B, C), without a copy of the maps in float32."""

    @staticmethod
    def forward(ctx: Any, z_BCHW: Tensor) -> Tensor:
        ctx.shape = z_BCHW.shape
        return z_BCHW.mean((2, 3), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        shape, (to_BC,) = ctx.shape, gradients
        to_map_BC = torch.empty_like(to_BC, dtype=torch.bfloat16)
        torch.div(to_BC, shape[2] * shape[3], out=to_map_BC)
        return to_map_BC[:, :, None, None].expand(shape)


def is_vector(value: Tensor) -> bool:
    """Whether a tensor has one dimension that counts, as biases and layer scales have."""
    return value.numel() == max(value.shape)


def matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a module's convolutions, linear layers and attention, by name."""
    for name, value in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        layer = module.get_submodule(owner)
        if (kind == "weight" and isinstance(layer, nn.Conv2d | nn.Linear)) or (
                kind == "in_proj_weight" and isinstance(layer, nn.MultiheadAttention)):
            yield name, value


KINDS = {"attention": ("*attn*", "*attention*"),
         "mlp": ("*mlp*", "*.conv_pw*", "*.fc1.*", "*.fc2.*")}
"""Patterns of the names of a network's matrices that a word of `generate` stands for."""


def chosen_matrices(cut: CutNetwork, generate: str) -> list[tuple[str, Tensor]]:
    """The matrices of a cut network's head that are generated, by their names in the head.

    A pattern is matched against a matrix's name in the network, such as
    blocks.11.attn.qkv.weight.

    Raises: InputError for a pattern that names no matrix.
    """
    everything = list(matrices(cut.stages))
    if generate == "all":
        return everything
    patterns = KINDS.get(generate, (generate,))
    chosen = [(name, value) for name, value in everything
              if any(fnmatch.fnmatch(cut.names[name], pattern) for pattern in patterns)]
    if not chosen and everything:
        raise InputError(f"generate is {generate!r}, which names no matrix above the cut of "
                         f"{cut.trunk.name}; allowed: all, attention, mlp, or a pattern of names "
                         f"such as {', '.join(cut.names[name] for name, _ in everything[:3])}")
    return chosen


def head_start(cut: CutNetwork, norm: Norm, seed: int, generate: str = "all") -> HeadStart:
    """The weights that the first head starts from.

    With batch norm these are the network's own later blocks. They were trained with batch norm, and
    where another normalisation takes its place a fresh start (Kaiming, fan out) does better. A
    linear head starts with scales of one and shifts of zero.
    """
    blocks = cut.stages
    if not len(blocks):
        return HeadStart([], _halves(1.0, 0.0, 2 * cut.width))
    chosen = [value.detach() for _, value in chosen_matrices(cut, generate)]
    norms = [layer for layer in blocks.modules() if isinstance(layer, nn.BatchNorm2d)]
    scales = [layer.weight.detach() for layer in norms]
    shifts = [layer.bias.detach() for layer in norms]
    other_norm = norms and norm not in BATCH_NORMS
    if other_norm:
        with seeded(seed):
            chosen = [nn.init.kaiming_normal_(torch.empty(value.shape), mode="fan_out",
                                              nonlinearity="relu") for value in chosen]
        scales, shifts = [x * 0 + 1 for x in scales], [x * 0 for x in shifts]
    own = {id(value) for layer in norms for value in layer.parameters()}
    matrix_ids = {id(value) for _, value in matrices(blocks)}
    others = [value.detach().flatten() for value in blocks.parameters()
              if id(value) not in own | matrix_ids and is_vector(value)]
    return HeadStart(chosen, torch.cat([*scales, *shifts, *others]),
                     None if other_norm else running_statistics(blocks))


def running_statistics(blocks: nn.Module) -> Tensor:
    """Running means, then variances, of all batch norms of maps; empty where there are none."""
    values = [value for part in ("running_mean", "running_var") for layer in blocks.modules()
              if isinstance(layer, nn.BatchNorm2d) and (value := getattr(layer, part)) is not None]
    return torch.cat([value.detach() for value in values]) if values else torch.empty(0)


def check_feature_size(norm: Norm, cut: CutNetwork, input_size: int) -> None:
    """Checks that a norm inside the head sees more than one pixel of a channel.

    Raises: InputError where it does not.
    """
    if norm != "instance" or not any(isinstance(layer, nn.BatchNorm2d)
                                     for layer in cut.stages.modules()):
        return
    z = torch.empty(1, 3, input_size, input_size, device="meta")
    for stage in (*cut.trunk.stages, *cut.stages):
        z = skeleton(stage).eval()(z)
    if z.dim() == 4 and z.shape[2] * z.shape[3] == 1:
        raise InputError(f"norm is 'instance' but with input_size {input_size} the last block of "
                         f"{cut.trunk.name} has a single pixel, which instance norm turns into "
                         "zero; allowed: a larger input_size, or norm group or layer")


def _replace_norms(module: nn.Module, norm: Norm, norm_groups: int) -> None:
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            _replace_norms(child, norm, norm_groups)
            continue
        width = child.num_features
        replacement: nn.Module = TaskBatchNorm(width, child.eps)
        if norm not in BATCH_NORMS:
            groups = {"instance": width, "layer": 1, "group": norm_groups}[norm]
            if width % groups:
                raise InputError(f"norm_groups is {norm_groups}; allowed: a divisor of every width "
                                 f"in the head, and {width} is one")
            replacement = nn.GroupNorm(groups, width)
        replacement.__dict__["replaced"] = True
        # timm's norms apply an activation too
        after = [part for part in child.children() if not isinstance(part, nn.Identity)]
        setattr(module, name, nn.Sequential(replacement, *after) if after else replacement)


def _names(layers: Iterable[str], first: str, second: str) -> list[str]:
    return [f"{layer}.{first}" for layer in layers] + [f"{layer}.{second}" for layer in layers]


def _halves(first: float, second: float, length: int) -> Tensor:
    return torch.cat([torch.full((length // 2,), first), torch.full((length // 2,), second)])
