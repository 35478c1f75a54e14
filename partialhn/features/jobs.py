"""The units of work in which images become stored features."""

import dataclasses
from typing import Literal

from partialhn.data.image_table import ImageTable
from partialhn.features.manifest import FeatureRecipe, Shard

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureJob:
    """The work of turning one split of one task into features at one depth."""

    task: str
    split: Split
    depth: int
    """Number of the network's stages that the images go through."""
    shape_CHW: tuple[int, ...]
    """Shape of one image's features."""
    recipe: FeatureRecipe
    table: ImageTable
    on_bad_image: Literal["error", "skip"]
    max_image_pixels: int

    @property
    def shards(self) -> int:
        """Number of shards that the job writes."""
        return -(-len(self.table) // self.recipe.shard_rows)


JobGroup = tuple[FeatureJob, ...]
"""Jobs on the same images, which are computed together."""
ShardPlace = tuple[int, int]
"""Index of a group, and index of a shard within each job of that group."""
ShardResult = tuple[ShardPlace, list[Shard], int]
"""A finished place: one shard for each job of its group, in order, and the number of images that
were decoded for it."""
