"""A task's whole network as ordinary modules: pixels of 0..1 to logits.

The trunk and a generated head are put together once, with the head's weights in place, so that
other libraries can trace the result. Batch norms of a task become PyTorch's own.

Legend: B batch, C channels, H W spatial, F features before the classifier, K classes of a task,
L most classes of a task, T tasks, P tasks of one kind.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from partialhn.networks.backbone import Layout, pooled, to_map
from partialhn.networks.head import EveryBlock, Head, HeadWeights
from partialhn.networks.later_blocks import filled
from partialhn.networks.trunk import Trunk

ABSENT = -1e9
"""The logit of a class that a task does not have: softmax turns it into 0."""


class FrozenPart(nn.Module):
    """Normalisation of the pixels and the trunk's blocks.

    Gives what the last block gives; with every block frozen that is pooled, (B, F).
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        self.register_buffer("mean_C", trunk.mean_C)
        self.register_buffer("std_C", trunk.std_C)
        self.stages = nn.Sequential(*trunk.stages)
        self._whole = trunk.freeze_depth == len(trunk.names)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        z = self.stages((pixels_BCHW - self.mean_C[:, None, None]) / self.std_C[:, None, None])
        return pooled(z) if self._whole else cast(Tensor, z)


class Cells(nn.Module):
    """The mean of each of side x side cells of the trunk's features, as one row an image."""

    def __init__(self, side: int, layout: Layout) -> None:
        super().__init__()
        self.side, self._layout = side, layout

    def forward(self, z: Tensor) -> Tensor:
        if z.dim() == 2:
            return z
        return nn.functional.adaptive_avg_pool2d(to_map(z, self._layout), self.side).flatten(1)


class LastBlock(nn.Module):
    """The pooled features (B, F) of the last of some blocks."""

    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, z: Tensor) -> Tensor:
        return pooled(self.blocks(z))


class TaskNetwork(nn.Module):
    """One task's network: pixels_BCHW, float32 of 0..1, to logits_BK.

    Args:
        trunk: the frozen part; its modules are shared with the network.
        head: the head of the task's strategy.
        weights: the head's weights for the task.
    """

    def __init__(self, trunk: Trunk, head: Head, weights: HeadWeights) -> None:
        super().__init__()
        kind = kind_of(head, weights)
        self.trunk = FrozenPart(trunk)
        self.head = kind.after(trunk.layout, head, own_blocks(head, weights)
                               if kind.side is None else nn.Sequential())
        weight_KF, bias_K = linear_part(head, weights)
        self.classifier = nn.Linear(weight_KF.shape[1], len(weight_KF))
        with torch.no_grad():
            self.classifier.weight.copy_(weight_KF)
            self.classifier.bias.copy_(bias_K)
        self.eval().requires_grad_(False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.head(self.trunk(pixels_BCHW))))


class TaskNetworks(nn.Module):
    """The networks of all tasks in one: pixels_BCHW and the task's index to logits_BL.

    The trunk runs once; the task chooses the head's weights. Classes that a task lacks have the
    logit ABSENT.

    Args:
        trunk: the frozen part; its modules are shared with the network.
        head: the head of the tasks' strategy.
        weights: the head's weights for each of T tasks.
    """

    def __init__(self, trunk: Trunk, head: Head, weights: Sequence[HeadWeights]) -> None:
        super().__init__()
        self.trunk = FrozenPart(trunk)
        classes = max(len(own.bias_K) for own in weights)
        kinds = [kind_of(head, own) for own in weights]
        self.kinds = nn.ModuleList(
            _Heads(head, trunk.layout, kind, weights,
                   [task for task, own in enumerate(kinds) if own == kind], classes)
            for kind in dict.fromkeys(kinds))
        self.eval().requires_grad_(False)

    def forward(self, pixels_BCHW: Tensor, task: Tensor) -> Tensor:
        z, task_1 = self.trunk(pixels_BCHW), task.reshape(1)
        logits_BL = cast(Tensor, self.kinds[0](z, task_1))
        for kind in list(self.kinds)[1:]:
            mine_1 = cast(_Heads, kind).mine_T.index_select(0, task_1)
            logits_BL = torch.where(mine_1[:, None], kind(z, task_1), logits_BL)
        return logits_BL


class _Heads(nn.Module):
    """The heads of those tasks that are of one kind, with their weights one behind the other."""

    mine_T: Tensor
    row_T: Tensor

    def __init__(self, head: Head, layout: Layout, kind: "Kind",
                 weights: Sequence[HeadWeights], tasks: list[int], classes: int) -> None:
        super().__init__()
        mine_T = torch.zeros(len(weights), dtype=torch.bool)
        row_T = torch.zeros(len(weights), dtype=torch.int64)
        mine_T[tasks], row_T[tasks] = True, torch.arange(len(tasks))
        self.register_buffer("mine_T", mine_T)
        self.register_buffer("row_T", row_T)
        features = kind.after(layout, head, copy.deepcopy(head.blocks))
        self.__dict__["_features"] = features.eval()  # its parameters are nobody's weights
        self._names: dict[str, tuple[str, bool]] = {}
        if kind.side is None:
            values = [head.tensors(weights[task]) for task in tasks]
            for index, name in enumerate(values[0]):
                self._keep(f"blocks.{name}", f"tensor_{index}", [value[name] for value in values])
        linear = [linear_part(head, weights[task]) for task in tasks]
        self._keep("weight_KF", "weight_PKF", [_padded(weight_KF, classes, 0.0)
                                               for weight_KF, _ in linear])
        self._keep("bias_K", "bias_PK", [_padded(bias_K, classes, ABSENT) for _, bias_K in linear])

    def _keep(self, name: str, buffer: str, values: list[Tensor]) -> None:
        """Keeps one tensor of every task; where all are equal, once."""
        alike = all(torch.equal(value, values[0]) for value in values[1:])
        self.register_buffer(buffer, (values[0] if alike else torch.stack(values)).detach())
        self._names[name] = buffer, alike

    def forward(self, z: Tensor, task_1: Tensor) -> Tensor:
        row_1 = self.row_T.index_select(0, task_1)
        tensors = {name: self.get_buffer(buffer) if alike
                   else self.get_buffer(buffer).index_select(0, row_1)[0]
                   for name, (buffer, alike) in self._names.items()}
        weight_KF, bias_K = tensors.pop("weight_KF"), tensors.pop("bias_K")
        x_BF = torch.func.functional_call(cast(nn.Module, self.__dict__["_features"]), tensors,
                                          (z,), strict=True)
        return nn.functional.linear(x_BF, weight_KF, bias_K)


class Kind(NamedTuple):
    """What a head's classifier sees: `side` x `side` cells of the trunk's features, or, where it is
    None, what the blocks give; of the blocks in `earlier`, and of the trunk, too, where that is not
    None.
    """

    side: int | None
    earlier: tuple[int, ...] | None = None

    def after(self, layout: Layout, head: Head, blocks: nn.Module) -> nn.Module:
        """The part of a network between the trunk and the classifier. layout: of the trunk."""
        if self.side is not None:
            return Cells(self.side, layout)
        return (LastBlock(blocks) if self.earlier is None
                else EveryBlock(blocks, layout, head.passed_on, self.earlier))


def kind_of(head: Head, weights: HeadWeights) -> Kind:
    """The kind of a task's head."""
    if not len(weights.norm):
        return Kind(head.side(weights))
    return Kind(1 if head.is_linear else None,
                None if weights.earlier is None else weights.earlier.blocks)


def linear_part(head: Head, weights: HeadWeights) -> tuple[Tensor, Tensor]:
    """The classifier (K, F) and its bias (K,), which take over a linear head's norm."""
    weight_KF, bias_K = weights.whole_classifier.detach(), weights.bias_K.detach()
    if head.is_linear and len(weights.norm):
        norm = weights.norm.detach()
        scale_F, shift_F = (norm if weights.statistics is None
                            else head.fold(norm, weights.statistics)).chunk(2)
        weight_KF, bias_K = weight_KF * scale_F, bias_K + weight_KF @ shift_F
    return weight_KF, bias_K


def own_blocks(head: Head, weights: HeadWeights) -> nn.Sequential:
    """The head's blocks as modules that own one task's weights."""
    return filled(head.blocks, {name: value.detach().clone()
                                for name, value in head.tensors(weights).items()})


def _padded(value: Tensor, rows: int, filling: float) -> Tensor:
    if len(value) == rows:
        return value
    rest = value.new_full((rows - len(value), *value.shape[1:]), filling)
    return torch.cat([value, rest])
