"""Images to stored features, a shard at a time: the same bytes whoever computes the shard.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from partialhn.backbone import Trunk
from partialhn.config import Augment, Config
from partialhn.datasets import decode
from partialhn.errors import InputError
from partialhn.store import FeatureRecipe, FeatureStore, Manifest, Shard
from partialhn.stream import Experience, ImageTable
from partialhn.views import augment

MICRO_BATCH = 64
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureJob:
    """One split of one task, to be turned into features."""

    task: str
    split: Split
    recipe: FeatureRecipe
    table: ImageTable
    on_bad_image: Literal["error", "skip"]
    max_image_pixels: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.table) // self.recipe.shard_rows)


def feature_jobs(config: Config, experiences: Sequence[Experience],
                 trunk: Trunk) -> list[FeatureJob]:
    """Every split of every task that has images, in order; training images get all views."""
    fingerprint = trunk.fingerprint()
    return [FeatureJob(experience.name, split,
                       _recipe(config, experience, split, fingerprint),
                       table, config.data.on_bad_image, config.data.max_image_pixels)
            for experience in experiences for split in SPLITS
            if len(table := getattr(experience, split))]


def _recipe(config: Config, experience: Experience, split: Split, trunk: str) -> FeatureRecipe:
    views = config.features.views if split == "train" else 1
    table: ImageTable = getattr(experience, split)
    return FeatureRecipe(trunk, table.fingerprint(), experience.transform, config.data.input_size,
                         views, config.features.augment if views > 1 else "none",
                         config.data.stream_seed, config.features.feature_dtype,
                         config.features.shard_rows)


def compute_shard(store: FeatureStore, trunk: Trunk, job: FeatureJob, index: int) -> Shard:
    """Decodes, augments, runs the trunk and writes one shard, unless a writer finished it.

    Raises: InputError naming an image that cannot be read, where job.on_bad_image is error.
    """
    found = store.find_shard(job.recipe.key, index)
    if found is not None:
        return found
    start = time.perf_counter()
    recipe, total = job.recipe, len(job.table)
    rows_N = np.arange(index * recipe.shard_rows, min((index + 1) * recipe.shard_rows, total))
    part = job.table.take(rows_N)
    decoded = decode(part, recipe.input_size, recipe.transform, job.on_bad_image,
                     job.max_image_pixels, recipe.seed)
    kept = decoded.index_B.numpy()
    z_NVCHW = torch.stack([
        run_trunk(trunk, augment(decoded.images_BCHW, rows_N[kept], total, view,
                                 cast(Augment, recipe.augment), recipe.seed))
        for view in range(recipe.views)], dim=1)
    ids = part.ids()
    return store.write_shard(recipe, index, z_NVCHW, part.label_N[kept],
                             [ids[row] for row in kept], seconds=time.perf_counter() - start,
                             bad=[(bad.id, bad.reason) for bad in decoded.bad])


def commit_features(store: FeatureStore, job: FeatureJob, shards: Sequence[Shard],
                    shape_CHW: Sequence[int]) -> Manifest:
    """Makes a job's features visible once all its shards are there.

    Raises: InputError where skipping unreadable images left nothing.
    """
    if not any(shard.rows for shard in shards):
        raise InputError(f"task {job.task!r} has no readable {job.split} image: all "
                         f"{len(job.table)} were skipped; allowed: at least one")
    return store.commit(job.recipe, shards, (job.recipe.views, *shape_CHW))


def run_trunk(trunk: Trunk, images_BCHW: Tensor) -> Tensor:
    """z_BCHW of uint8 images, computed in batches of one size whatever B is.

    A convolution may round differently for another batch size; with the last batch filled up, an
    image's features are the same bits in any company.
    """
    device = trunk.mean_C.device
    parts = []
    for chunk_BCHW in torch.split(images_BCHW, MICRO_BATCH):
        missing = MICRO_BATCH - len(chunk_BCHW)
        filled_BCHW = torch.nn.functional.pad(chunk_BCHW, [0] * 7 + [missing])
        parts.append(trunk(filled_BCHW.to(device))[:len(chunk_BCHW)].cpu())
    return torch.cat(parts) if parts else torch.empty(0, *feature_shape(trunk, images_BCHW))


def feature_shape(trunk: Trunk, images_BCHW: Tensor) -> tuple[int, ...]:
    """(C, H, W) of one image's features."""
    one_BCHW = torch.zeros(1, *images_BCHW.shape[1:], dtype=torch.uint8,
                           device=trunk.mean_C.device)
    return tuple(trunk(one_BCHW).shape[1:])
