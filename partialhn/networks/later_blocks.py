"""A head's blocks as modules that hold weights, for passes that repeat with the same weights.

`Head` gives its blocks all tensors anew in every call, because a step of training changes them.
For a single image this takes as long as a quarter of the blocks' own calculation, so weights that
stay are put in place once.

Legend: B batch, C channels, H W spatial.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from partialhn.networks.backbone import pooled, spread_of, to_map
from partialhn.networks.head import Head, HeadWeights, TaskBatchNorm


class LaterBlocks:
    """What each block of a head gives with one set of weights."""

    def __init__(self, head: Head, weights: HeadWeights) -> None:
        """weights: stay as they are, and are not copied."""
        self._head, self._blocks = head, filled(head.blocks, head.tensors(weights))

    @torch.no_grad()
    def __call__(self, z_BCHW: Tensor, blocks: Sequence[int] | None = None,
                 spreads: Sequence[int] = ()) -> list[Tensor]:
        """Features to pooled features of some blocks, then to the standard deviations over the
        positions of some blocks' maps: float32, (B, C of the block) each.

        blocks, spreads: their numbers above the cut. None is all of them, and -1 the last, whose
        features are those of `Head.embed`; spreads are of blocks before it. Blocks after the last
        one that is wanted do not run.
        """
        count = len(self._blocks)
        wanted = range(count) if blocks is None else [block % count for block in blocks]
        z, found, spread = self._head.taken(z_BCHW), {}, {}
        for number, block in enumerate(self._blocks[:max([*wanted, *spreads]) + 1]):
            z = cast(Tensor, block(z))
            if number in wanted:
                found[number] = (pooled(z) if number == count - 1
                                 else to_map(z, self._head.passed_on).mean((2, 3)))
            if number in spreads:
                spread[number] = spread_of(to_map(z, self._head.passed_on))
        return [x_BC.float() for x_BC in (*(found[number] for number in wanted),
                                          *(spread[number] for number in spreads))]


def filled(blocks: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """Blocks in evaluation mode that hold these tensors.

    blocks: their structure, which stays as it is. tensors: every tensor of it by name, as
    `Head.tensors` gives them; they are not copied.
    """
    blocks = copy.deepcopy(blocks)
    named = {**dict(blocks.named_parameters()), **dict(blocks.named_buffers())}
    values: dict[int, Tensor] = {}
    for name, value in tensors.items():
        is_parameter = isinstance(named[name], nn.Parameter)
        values[id(named[name])] = nn.Parameter(value.detach(), False) if is_parameter else (
            value.detach())
    for module in blocks.modules():  # every place of a tensor that several modules share
        for own in cast(tuple[dict[str, Tensor | None], ...],
                        (module._parameters, module._buffers)):
            own.update({kind: values[id(empty)] for kind, empty in own.items()
                        if empty is not None})
    _plain_norms(blocks)
    return cast(nn.Sequential, blocks.eval())


def _plain_norms(module: nn.Module) -> None:
    """Replaces a task's batch norms by PyTorch's own, which calculate the same."""
    for name, child in module.named_children():
        if isinstance(child, TaskBatchNorm):
            norm = nn.BatchNorm2d(len(child.weight), child.epsilon)
            norm.weight, norm.bias = child.weight, child.bias
            norm.running_mean = child.get_buffer("mean")
            norm.running_var = child.get_buffer("variance")
            setattr(module, name, norm)
        else:
            _plain_norms(child)
