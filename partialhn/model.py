"""The head h_omega: the stages above the cut as a function of weights that it does not own.

Legend: B batch, C channels, H W spatial, F features before the classifier, K classes.
"""

import copy
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.backbone import Network, head_stages
from partialhn.config import Norm
from partialhn.errors import InputError
from partialhn.hypernet import GeneratedTensor


class HeadWeights(NamedTuple):
    """Everything a head needs for one task: omega_t.

    convolutions: by name, generated or owned. norm: all scales, then all shifts, in one vector of
    2 N. classifier_KF and bias_K: the task's own.
    """

    convolutions: dict[str, Tensor]
    norm: Tensor
    classifier_KF: Tensor
    bias_K: Tensor


class Head(nn.Module):
    """Applies the later stages, pooling and a classifier to features, with the weights given.

    Its BatchNorms are replaced by a normalisation that looks at one image alone, so that a batch
    needs one set of weights and an answer depends on no other image. Holds no parameter: the
    skeleton lives on the meta device.
    """

    def __init__(self, network: Network, freeze_depth: int, norm: Norm, norm_groups: int) -> None:
        super().__init__()
        stages = head_stages(network, freeze_depth)
        _replace_norms(stages, norm, norm_groups)
        named = dict(stages.named_parameters())
        self.convolutions = tuple(GeneratedTensor(name, tuple(value.shape))
                                  for name, value in named.items() if value.dim() == 4)
        scales = [name for name, value in named.items()
                  if value.dim() == 1 and name.endswith("weight")]
        self.norm_widths = tuple(len(named[name]) for name in scales)
        self.norm_names = tuple(scales) + tuple(f"{name.removesuffix('weight')}bias"
                                                for name in scales)
        self.width = network.width
        # kept from nn.Module's registry: the skeleton's parameters are nobody's weights
        self.__dict__["skeleton"] = stages.to("meta")

    @property
    def norm_length(self) -> int:
        """Numbers in a task's norm vector: a scale and a shift for every normalised channel."""
        return 2 * sum(self.norm_widths)

    @property
    def weight_count(self) -> int:
        """Convolution weights of one task's head."""
        return sum(tensor.rows * tensor.row_length for tensor in self.convolutions)

    def first_norm(self) -> Tensor:
        """Scales of one, then shifts of zero."""
        half = self.norm_length // 2
        return torch.cat([torch.ones(half), torch.zeros(half)])

    def embed(self, z_BCHW: Tensor, weights: HeadWeights) -> Tensor:
        """Features to pooled features of the last stage, (B, F)."""
        values = torch.split(weights.norm, list(self.norm_widths * 2))
        tensors = dict(zip(self.norm_names, values, strict=True)) | weights.convolutions
        skeleton = cast(nn.Module, self.__dict__["skeleton"])
        z_BCHW = cast(Tensor, torch.func.functional_call(skeleton, tensors, (z_BCHW,), strict=True))
        return z_BCHW.mean((2, 3))

    def forward(self, z_BCHW: Tensor, weights: HeadWeights) -> Tensor:
        """Features z_BCHW to logits_BK with one task's weights."""
        return nn.functional.linear(self.embed(z_BCHW, weights), weights.classifier_KF,
                                    weights.bias_K)


def trained_convolutions(network: Network, freeze_depth: int) -> list[Tensor]:
    """The network's own weights of the head's convolutions, in the head's order."""
    stages = head_stages(network, freeze_depth)
    return [value for value in stages.parameters() if value.dim() == 4]


def check_feature_size(norm: Norm, network: Network, freeze_depth: int, input_size: int) -> None:
    """Raises InputError where a norm inside the head would see a single pixel of one channel."""
    if norm != "instance" or not len(head_stages(network, freeze_depth)):
        return
    z_BCHW = torch.empty(1, 3, input_size, input_size, device="meta")
    for stage in copy.deepcopy(nn.ModuleList(network.stages())).to("meta").eval():
        z_BCHW = stage(z_BCHW)
    if z_BCHW.shape[2] * z_BCHW.shape[3] == 1:
        raise InputError(f"norm is 'instance' but with input_size {input_size} the last stage of "
                         f"{network.name} has a single pixel, which instance norm turns into zero; "
                         "allowed: a larger input_size, or norm group or layer")


def _replace_norms(module: nn.Module, norm: Norm, norm_groups: int) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            width = child.num_features
            groups = {"instance": width, "layer": 1, "group": norm_groups}[norm]
            if width % groups:
                raise InputError(f"norm_groups is {norm_groups}; allowed: a divisor of every width "
                                 f"in the head, and {width} is one")
            setattr(module, name, nn.GroupNorm(groups, width))
        else:
            _replace_norms(child, norm, norm_groups)
