"""A stored feature set as a training loop reads it: by row and view.

Legend: N images, n images of a shard, V views, B batch, S shards, C channels, H W spatial.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partialhn.features.manifest import Manifest
from partialhn.features.mapping import release_pages


@dataclasses.dataclass(frozen=True, eq=False)
class Scales:
    """Scales of int8 features: one factor for each channel of each shard."""

    scale_SC: Tensor
    """The factor of each shard and channel."""
    shard_N: Tensor
    """Index of each image's shard."""

    @staticmethod
    def of(scales: Sequence[Tensor | None], rows: Sequence[int]) -> "Scales | None":
        """The scales of several shards with `rows` images each; None if no shard has scales."""
        first_C = next((scale_C for scale_C in scales if scale_C is not None), None)
        if first_C is None:
            return None
        ones_C = torch.ones_like(first_C)
        scale_SC = torch.stack([ones_C if scale_C is None else scale_C for scale_C in scales])
        return Scales(scale_SC, torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)))

    def to(self, device: torch.device) -> "Scales":
        return Scales(self.scale_SC.to(device), self.shard_N.to(device))

    def apply(self, z_BCHW: Tensor, rows_B: Tensor) -> Tensor:
        """Multiplies the stored whole numbers by their scales, in place: z_BCHW."""
        scale_BC = self.scale_SC[self.shard_N[rows_B]]
        return z_BCHW.mul_(scale_BC.view(*scale_BC.shape, *[1] * (z_BCHW.dim() - 2)))


@dataclasses.dataclass
class FeatureSet:
    """One task's features of one split: N images with V views each."""

    manifest: Manifest
    shards: list[Tensor]
    """Shape (n, V, C, H, W) in the stored number type; memory-mapped unless compressed."""
    y_N: Tensor
    """int64 labels."""
    ids: list[str]
    # a plain default would be an attribute of the class, which `UnopenedFeatures` must not have
    scales: Scales | None = dataclasses.field(default_factory=lambda: None)
    """Scales of int8 features; None for other number types."""
    joined: tuple[str, ...] = ()
    """Keys of the sets that were joined; empty for a single one."""

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return len(self.y_N)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the stored features."""
        return self.joined or (self.manifest.key,)

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
        """Bytes that the features take in memory."""
        return sum(shard.nbytes for shard in self.shards)

    def to(self, device: torch.device) -> "FeatureSet":
        """The features as one tensor on the device, copied there shard by shard: the host never
        holds them as a whole, unless it is the device.
        """
        if len(self.shards) == 1:
            whole = self.shards[0].to(device)
            if whole is not self.shards[0]:
                release_pages(self.shards[0])
        else:
            whole = torch.empty(len(self), *self.shards[0].shape[1:], dtype=self.shards[0].dtype,
                                device=device)
            for start, shard in zip(self._starts, self.shards, strict=False):
                whole[start:start + len(shard)] = shard
                release_pages(shard)
        return FeatureSet(self.manifest, [whole], self.y_N.to(device), self.ids,
                          self.scales and self.scales.to(device))

    def first_views(self, views: int) -> "FeatureSet":
        """The same images with their first views only (view v does not depend on the others)."""
        if self.views == views:
            return self
        manifest = dataclasses.replace(self.manifest,
                                       shape_VCHW=(views, *self.manifest.shape_VCHW[1:]))
        return dataclasses.replace(self, manifest=manifest, shards=[
            shard[:, :views].contiguous() for shard in self.shards])

    def gather(self, rows_B: Tensor, views_B: Tensor) -> Tensor:
        """z_BCHW as float32: row rows_B[b] seen through view views_B[b]."""
        if len(self.shards) == 1:
            return self.gather_one(rows_B * self.views + views_B, rows_B)
        z_BCHW = self._stored(rows_B, views_B)
        return z_BCHW if self.scales is None else self.scales.apply(z_BCHW, rows_B)

    def gather_one(self, index_B: Tensor, rows_B: Tensor, *, as_stored: bool = False) -> Tensor:
        """As `gather`, from a single shard. index_B: row times number of views, plus view.

        as_stored: whether numbers without scales keep their stored type.
        """
        z_BCHW = self.shards[0].flatten(0, 1).index_select(0, index_B)
        if as_stored and self.scales is None:
            return z_BCHW
        z_BCHW = z_BCHW.float()
        return z_BCHW if self.scales is None else self.scales.apply(z_BCHW, rows_B)

    def _stored(self, rows_B: Tensor, views_B: Tensor) -> Tensor:
        z_BCHW = torch.empty(len(rows_B), *self.shape_CHW)
        shard_B = np.searchsorted(self._starts, rows_B.numpy(), side="right") - 1
        for index in np.unique(shard_B):
            here = torch.from_numpy(np.flatnonzero(shard_B == index))
            flat = self.shards[index].flatten(0, 1)
            local_B = rows_B[here] - int(self._starts[index])
            z_BCHW[here] = flat.index_select(0, local_B * self.views + views_B[here]).float()
        return z_BCHW


class UnopenedFeatures(FeatureSet):
    """Features that are opened when they are first used; manifest and keys are known before.

    Once they are opened they are a plain `FeatureSet`.
    """

    def __init__(self, manifests: Sequence[Manifest], opened: Callable[[], FeatureSet]) -> None:
        """manifests: of the sets that `opened` opens and joins. It may raise IntegrityError."""
        self.manifest, self._opened = manifests[0], opened
        self.joined = tuple(each.key for each in manifests) if len(manifests) > 1 else ()

    def __getattr__(self, name: str) -> Any:
        if name not in ("shards", "y_N", "ids", "scales", "_starts"):
            raise AttributeError(name)
        self.__dict__ = dict(vars(self._opened()))
        self.__class__ = FeatureSet  # type: ignore[assignment]
        return getattr(self, name)


def join(sets: Sequence[FeatureSet]) -> FeatureSet | None:
    """Several feature sets of one shape as one; None for an empty sequence."""
    if len(sets) < 2:
        return sets[0] if sets else None
    shards = [shard for features in sets for shard in features.shards]
    scales = [scale_C for features in sets for scale_C in
              (features.scales.scale_SC if features.scales else [None] * len(features.shards))]
    return FeatureSet(sets[0].manifest, shards, torch.cat([features.y_N for features in sets]),
                      [name for features in sets for name in features.ids],
                      Scales.of(scales, [len(shard) for shard in shards]),
                      tuple(key for features in sets for key in features.keys))
