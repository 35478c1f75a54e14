"""A stored feature set as a training loop reads it: images by row and view.

Legend: N images, n images of a shard, V views, B batch, S shards, C channels, H W spatial.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from partialhn.features.manifest import Manifest


@dataclasses.dataclass(frozen=True, eq=False)
class Scales:
    """What stored whole numbers are multiplied with: a scale for each channel of each shard."""

    scale_SC: Tensor
    shard_N: Tensor
    """The shard of each image."""

    @staticmethod
    def of(scales: Sequence[Tensor | None], rows: Sequence[int]) -> "Scales | None":
        """The scales of shards with so many rows; None where no shard has one."""
        there = [scale_C for scale_C in scales if scale_C is not None]
        if not there:
            return None
        ones_C = torch.ones_like(there[0])
        scale_SC = torch.stack([ones_C if scale_C is None else scale_C for scale_C in scales])
        return Scales(scale_SC, torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)))

    def to(self, device: torch.device) -> "Scales":
        return Scales(self.scale_SC.to(device), self.shard_N.to(device))

    def apply(self, z_BCHW: Tensor, rows_B: Tensor) -> Tensor:
        """The numbers that were stored, in place."""
        scale_BC = self.scale_SC[self.shard_N[rows_B]]
        return z_BCHW.mul_(scale_BC.view(*scale_BC.shape, *[1] * (z_BCHW.dim() - 2)))


@dataclasses.dataclass
class FeatureSet:
    """One task's features of one split: N images with V views each."""

    manifest: Manifest
    shards: list[Tensor]
    """(n, V, C, H, W) in the stored number type, memory-mapped where they are not compressed."""
    y_N: Tensor
    """int64 labels."""
    ids: list[str]
    scales: Scales | None = None
    """For int8."""

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return len(self.y_N)

    @property
    def views(self) -> int:
        """Views V of each image."""
        return self.manifest.shape_VCHW[0]

    @property
    def shape_CHW(self) -> tuple[int, ...]:
        """Shape of one image's features."""
        return self.manifest.shape_VCHW[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the features in memory."""
        return sum(shard.nbytes for shard in self.shards)

    def to(self, device: torch.device) -> "FeatureSet":
        """One tensor on the device: read once, whatever the number of epochs."""
        whole = self.shards[0] if len(self.shards) == 1 else torch.cat(self.shards)
        return FeatureSet(self.manifest, [whole.to(device)], self.y_N.to(device), self.ids,
                          self.scales and self.scales.to(device))

    def first_views(self, views: int) -> "FeatureSet":
        """The same images with the first views alone: they do not depend on how many there are."""
        if self.views == views:
            return self
        manifest = dataclasses.replace(self.manifest,
                                       shape_VCHW=(views, *self.manifest.shape_VCHW[1:]))
        return dataclasses.replace(self, manifest=manifest, shards=[
            shard[:, :views].contiguous() for shard in self.shards])

    def gather(self, rows_B: Tensor, views_B: Tensor) -> Tensor:
        """z_BCHW as float32: row rows_B[b] seen through view views_B[b]."""
        z_BCHW = self._stored(rows_B, views_B)
        return z_BCHW if self.scales is None else self.scales.apply(z_BCHW, rows_B)

    def _stored(self, rows_B: Tensor, views_B: Tensor) -> Tensor:
        if len(self.shards) == 1:
            flat = self.shards[0].flatten(0, 1)
            return flat.index_select(0, rows_B * self.views + views_B).float()
        z_BCHW = torch.empty(len(rows_B), *self.shape_CHW)
        shard_B = np.searchsorted(self._starts, rows_B.numpy(), side="right") - 1
        for index in np.unique(shard_B):
            here = torch.from_numpy(np.flatnonzero(shard_B == index))
            flat = self.shards[index].flatten(0, 1)
            local_B = rows_B[here] - int(self._starts[index])
            z_BCHW[here] = flat.index_select(0, local_B * self.views + views_B[here]).float()
        return z_BCHW


def join(sets: Sequence[FeatureSet]) -> FeatureSet | None:
    """Several feature sets of one shape as one; None of none."""
    if len(sets) < 2:
        return sets[0] if sets else None
    shards = [shard for each in sets for shard in each.shards]
    scales = [scale_C for each in sets for scale_C in
              (each.scales.scale_SC if each.scales else [None] * len(each.shards))]
    return FeatureSet(sets[0].manifest, shards, torch.cat([each.y_N for each in sets]),
                      [name for each in sets for name in each.ids],
                      Scales.of(scales, [len(shard) for shard in shards]))
