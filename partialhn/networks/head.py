"""The head h_omega: the stages above the cut as a function of weights that it does not own.

Legend: B batch, C channels, H W spatial, F features before the classifier, K classes.
"""

import copy
from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.config import Norm, Precision
from partialhn.errors import InputError
from partialhn.networks.cut import CutNetwork, skeleton
from partialhn.networks.hypernet import GeneratedTensor
from partialhn.networks.precision import autocast_to


class HeadWeights(NamedTuple):
    """All weights of a head for one task: omega_t. N normalised channels.

    convolutions: by name, generated or owned. norm: all scales, then all shifts, in one vector of
    2 N. classifier_KF and bias_K: the task's own. statistics: running means, then variances, 2 N,
    while a task is learned with batch norm; None where they are folded into `norm`, and for the
    other norms.
    """

    convolutions: dict[str, Tensor]
    norm: Tensor
    classifier_KF: Tensor
    bias_K: Tensor
    statistics: Tensor | None = None


class HeadStart(NamedTuple):
    """The weights of a head before its first step: convolutions in its order, and norm."""

    convolutions: list[Tensor]
    norm: Tensor


class TaskBatchNorm(nn.Module):
    """Batch norm whose statistics belong to a task, and an affine map once they are folded.

    While a task is learned it uses the batch's statistics and updates the running ones. Otherwise
    it uses the running ones, so the logits of an image depend on no other image.
    """

    EPS, MOMENTUM = 1e-5, 0.1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, z_BCHW: Tensor) -> Tensor:
        return nn.functional.batch_norm(z_BCHW, self.get_buffer("mean"),
                                        self.get_buffer("variance"), self.weight, self.bias,
                                        self.training, self.MOMENTUM, self.EPS)


class Head(nn.Module):
    """Applies the later stages, pooling and a classifier to features, with the weights given.

    One set of weights serves a whole batch, and once a task is learned the logits of an image
    depend on no other image. A head holds no parameter: its skeleton lives on the meta device.
    Where every stage is frozen the head is linear: pooled features, standardised by a task's batch
    norm whatever `norm` says (the others need more than one pixel), and a classifier.

    Args:
        cut: the network whose later stages give the head its shapes.
        norm: normalisation that replaces the network's batch norms.
        norm_groups: channel groups of norm group.
        precision: number type of convolutions and norms while training; logits are float32.

    Raises: InputError where `norm_groups` does not divide every width in the head.
    """

    def __init__(self, cut: CutNetwork, norm: Norm, norm_groups: int,
                 precision: Precision = "float32") -> None:
        super().__init__()
        self.width, self.precision = cut.width, precision
        self.convolutions: tuple[GeneratedTensor, ...] = ()
        stages = skeleton(cut.stages)
        if not len(cut.stages):
            self._become_linear(cut.width)
            return
        _replace_norms(stages, norm, norm_groups)
        named = dict(stages.named_parameters())
        self.convolutions = tuple(GeneratedTensor(name, tuple(value.shape))
                                  for name, value in named.items() if value.dim() == 4)
        layers = [name.removesuffix(".weight") for name, value in named.items()
                  if value.dim() == 1 and name.endswith(".weight")]
        self.norm_widths = [len(named[f"{layer}.weight"]) for layer in layers]
        self._norm_names = _names(layers, "weight", "bias")
        self._statistic_names = _names(layers, "mean", "variance") if norm == "batch" else []
        # kept from nn.Module's registry: the skeleton's parameters are nobody's weights
        self.__dict__["_skeleton"] = stages.to("meta")  # the new norms are on the CPU

    def train(self, mode: bool = True) -> "Head":
        """Batch norm uses the batch's own statistics while training."""
        cast(nn.Module, self.__dict__["_skeleton"]).train(mode)
        return super().train(mode)

    def without_stages(self) -> "Head":
        """A linear head over the same features: pooling, a task's batch norm, a classifier."""
        bare = copy.copy(self)
        bare._become_linear(self.convolutions[0].shape[1] if self.convolutions else self.width)
        return bare

    def _become_linear(self, width: int) -> None:
        self.width, self.norm_widths = width, [width]
        self.convolutions = ()
        self._norm_names = _names(["1"], "weight", "bias")
        self._statistic_names = _names(["1"], "mean", "variance")
        self.__dict__["_skeleton"] = nn.Sequential(nn.AdaptiveAvgPool2d(1),
                                                   TaskBatchNorm(width)).to("meta")

    @property
    def norm_length(self) -> int:
        """Length of a task's norm vector: a scale and a shift for every normalised channel."""
        return 2 * sum(self.norm_widths)

    @property
    def weight_count(self) -> int:
        """Convolution weights of one task's head."""
        return sum(tensor.rows * tensor.row_length for tensor in self.convolutions)

    def named(self, convolutions: Iterable[Tensor]) -> dict[str, Tensor]:
        """Convolution weights by name, given in the head's order."""
        names = [tensor.name for tensor in self.convolutions]
        return dict(zip(names, convolutions, strict=True))

    def first_statistics(self) -> Tensor | None:
        """Means of zero, then variances of one, for a task about to be learned with batch norm."""
        return _halves(0.0, 1.0, self.norm_length) if self._statistic_names else None

    def fold(self, norm: Tensor, statistics: Tensor) -> Tensor:
        """The scales and shifts whose affine map equals batch norm with these statistics."""
        scale, shift = norm.chunk(2)
        mean, variance = statistics.chunk(2)
        folded = scale / (variance + TaskBatchNorm.EPS).sqrt()
        return torch.cat([folded, shift - folded * mean])

    def embed(self, z_BCHW: Tensor, weights: HeadWeights) -> Tensor:
        """Features to pooled features of the last stage, (B, F)."""
        widths = self.norm_widths * 2
        parts = torch.split(weights.norm, widths)
        tensors = weights.convolutions | dict(zip(self._norm_names, parts, strict=True))
        if self._statistic_names:
            statistics = weights.statistics
            if statistics is None:
                statistics = _halves(0.0, 1.0 - TaskBatchNorm.EPS, self.norm_length).to(parts[0])
            parts = torch.split(statistics, widths)
            tensors |= dict(zip(self._statistic_names, parts, strict=True))
        skeleton = cast(nn.Module, self.__dict__["_skeleton"])
        precision = self.precision if self.training and self.convolutions else "float32"
        with autocast_to(precision, z_BCHW.device):
            z_BCHW = cast(Tensor, torch.func.functional_call(skeleton, tensors, (z_BCHW,),
                                                             strict=True))
        return z_BCHW.to(weights.classifier_KF.dtype).mean((2, 3))

    def forward(self, z_BCHW: Tensor, weights: HeadWeights) -> Tensor:
        """Features z_BCHW to logits_BK with one task's weights."""
        return nn.functional.linear(self.embed(z_BCHW, weights), weights.classifier_KF,
                                    weights.bias_K)


def head_start(cut: CutNetwork, norm: Norm, seed: int) -> HeadStart:
    """The weights that the first head starts from.

    With batch norm these are the network's own later stages. They were trained with batch norm, and
    under another normalisation a fresh start (Kaiming, fan out) does better. A linear head starts
    with scales of one and shifts of zero.
    """
    stages = cut.stages
    if not len(stages):
        return HeadStart([], _halves(1.0, 0.0, 2 * cut.width))
    convolutions = [value.detach() for value in stages.parameters() if value.dim() == 4]
    norms = [layer for layer in stages.modules() if isinstance(layer, nn.BatchNorm2d)]
    scales = [layer.weight.detach() for layer in norms]
    shifts = [layer.bias.detach() for layer in norms]
    if norm != "batch":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            convolutions = [nn.init.kaiming_normal_(torch.empty(value.shape), mode="fan_out",
                                                    nonlinearity="relu") for value in convolutions]
        scales, shifts = [x * 0 + 1 for x in scales], [x * 0 for x in shifts]
    return HeadStart(convolutions, torch.cat([*scales, *shifts]))


def check_feature_size(norm: Norm, cut: CutNetwork, input_size: int) -> None:
    """Checks that a norm inside the head sees more than one pixel of a channel.

    Raises: InputError where it does not.
    """
    if norm != "instance" or not len(cut.stages):
        return
    z_BCHW = torch.empty(1, 3, input_size, input_size, device="meta")
    for stage in (*cut.trunk.stages, *cut.stages):
        z_BCHW = skeleton(stage).eval()(z_BCHW)
    if z_BCHW.shape[2] * z_BCHW.shape[3] == 1:
        raise InputError(f"norm is 'instance' but with input_size {input_size} the last stage of "
                         f"{cut.trunk.name} has a single pixel, which instance norm turns into "
                         "zero; allowed: a larger input_size, or norm group or layer")


def _replace_norms(module: nn.Module, norm: Norm, norm_groups: int) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            width = child.num_features
            if norm == "batch":
                setattr(module, name, TaskBatchNorm(width))
                continue
            groups = {"instance": width, "layer": 1, "group": norm_groups}[norm]
            if width % groups:
                raise InputError(f"norm_groups is {norm_groups}; allowed: a divisor of every width "
                                 f"in the head, and {width} is one")
            setattr(module, name, nn.GroupNorm(groups, width))
        else:
            _replace_norms(child, norm, norm_groups)


def _names(layers: list[str], first: str, second: str) -> list[str]:
    return [f"{layer}.{first}" for layer in layers] + [f"{layer}.{second}" for layer in layers]


def _halves(first: float, second: float, length: int) -> Tensor:
    return torch.cat([torch.full((length // 2,), first), torch.full((length // 2,), second)])
