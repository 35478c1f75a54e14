"""Images to stored features, a shard at a time: the same bytes whoever computes the shard.

Jobs that differ in the depth alone are one pass: images are decoded once, the stages run once,
and features are kept at each depth that is asked for.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from partialhn.backbone import Trunk
from partialhn.config import Augment, Config
from partialhn.datasets import Decoded, decode
from partialhn.errors import InputError
from partialhn.store import FeatureRecipe, FeatureStore, Manifest, Shard
from partialhn.stream import Experience, ImageTable
from partialhn.views import augment

MICRO_BATCH = 64
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureJob:
    """One split of one task, to be turned into features at one depth."""

    task: str
    split: Split
    depth: int
    """Stages of the trunk that the images go through."""
    shape_CHW: tuple[int, ...]
    """Shape of one image's features."""
    recipe: FeatureRecipe
    table: ImageTable
    on_bad_image: Literal["error", "skip"]
    max_image_pixels: int

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.table) // self.recipe.shard_rows)


Pass = tuple[FeatureJob, ...]
"""Jobs that are computed together, each at a depth of its own."""


def feature_jobs(config: Config, experiences: Sequence[Experience], trunk: Trunk,
                 depths: Sequence[int] | None = None) -> list[FeatureJob]:
    """Every split of every task that has images, in order; training images get all views.

    depths: of `trunk` or shallower, one after the other; default: the trunk's own.
    """
    size = config.data.input_size
    images_BCHW = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    jobs = []
    for depth in depths or (trunk.freeze_depth,):
        cut = trunk.upto(depth)
        fingerprint, shape_CHW = cut.fingerprint(), feature_shape(cut, images_BCHW)
        jobs += [FeatureJob(experience.name, split, depth, shape_CHW,
                            _recipe(config, experience, split, fingerprint), table,
                            config.data.on_bad_image, config.data.max_image_pixels)
                 for experience in experiences for split in SPLITS
                 if len(table := getattr(experience, split))]
    return jobs


def _recipe(config: Config, experience: Experience, split: Split, trunk: str) -> FeatureRecipe:
    views = config.features.views if split == "train" else 1
    table: ImageTable = getattr(experience, split)
    return FeatureRecipe(trunk, table.fingerprint(), experience.transform, config.data.input_size,
                         views, config.features.augment if views > 1 else "none",
                         config.data.stream_seed, config.features.feature_dtype,
                         config.features.shard_rows, config.features.compression)


def passes(jobs: Sequence[FeatureJob]) -> list[Pass]:
    """Puts together what differs in depth and number type or compression; of equals one remains."""
    groups: dict[FeatureRecipe, dict[str, FeatureJob]] = {}
    for job in jobs:
        common = dataclasses.replace(job.recipe, trunk="", dtype="", compression="")
        groups.setdefault(common, {}).setdefault(job.recipe.key, job)
    return [tuple(group.values()) for group in groups.values()]


def compute_shards(store: FeatureStore, trunk: Trunk, jobs: Pass,
                   index: int) -> tuple[list[Shard], int]:
    """One shard of every job of a pass, computing those that no writer has finished.

    Returns the shards in the order of the jobs, and how many images were decoded. `trunk` is as
    deep as the deepest job or deeper.

    Raises: InputError naming an image that cannot be read, where on_bad_image is error.
    """
    found = {job.recipe.key: store.find_shard(job.recipe.key, index) for job in jobs}
    missing = [job for job in jobs if found[job.recipe.key] is None]
    decoded = 0
    if missing:
        first, total = missing[0], len(missing[0].table)
        rows = first.recipe.shard_rows
        rows_N = np.arange(index * rows, min((index + 1) * rows, total))
        part = first.table.take(rows_N)
        start = time.perf_counter()
        images = decode(part, first.recipe.input_size, first.recipe.transform,
                        first.on_bad_image, first.max_image_pixels, first.recipe.seed)
        decoded, decoding = len(part), time.perf_counter() - start
        kept = images.index_B.numpy()
        ids = part.ids()
        z_NVCHW, seconds = _features(trunk, missing, images, rows_N[kept])
        for job in missing:
            found[job.recipe.key] = store.write_shard(
                job.recipe, index, z_NVCHW[job.depth], part.label_N[kept],
                [ids[row] for row in kept], seconds=decoding + seconds[job.depth],
                bad=[(bad.id, bad.reason) for bad in images.bad])
    return [cast(Shard, found[job.recipe.key]) for job in jobs], decoded


def _features(trunk: Trunk, jobs: Sequence[FeatureJob], images: Decoded,
              rows_N: np.ndarray) -> tuple[dict[int, Tensor], dict[int, float]]:
    """z_NVCHW of every view at each depth, and the seconds it takes to get there from images."""
    recipe = jobs[0].recipe
    seconds = {job.depth: 0.0 for job in jobs}
    views = []
    for view in range(recipe.views):
        start = time.perf_counter()
        images_BCHW = augment(images.images_BCHW, rows_N, len(jobs[0].table), view,
                              cast(Augment, recipe.augment), recipe.seed)
        augmenting = time.perf_counter() - start
        z_BCHW, spent = run_trunk_at(trunk, seconds, images_BCHW)
        views.append(z_BCHW)
        for depth in seconds:
            seconds[depth] += augmenting + spent[depth]
    return {depth: torch.stack([view[depth] for view in views], dim=1)
            for depth in seconds}, seconds


def commit_features(store: FeatureStore, job: FeatureJob, shards: Sequence[Shard]) -> Manifest:
    """Makes a job's features visible once all its shards are there.

    Raises: InputError where skipping unreadable images left nothing.
    """
    if not any(shard.rows for shard in shards):
        raise InputError(f"task {job.task!r} has no readable {job.split} image: all "
                         f"{len(job.table)} were skipped; allowed: at least one")
    return store.commit(job.recipe, shards, (job.recipe.views, *job.shape_CHW))


def precompute(store: FeatureStore, trunk: Trunk,
               jobs: Sequence[FeatureJob]) -> tuple[list[Manifest], int]:
    """The manifests of all jobs, computed here where they are not there; images decoded.

    `trunk` is as deep as the deepest job or deeper. Raises: InputError, as `compute_shards`.
    """
    check_trunk(trunk, jobs)
    manifests = find_features(store, jobs)
    decoded = 0
    for group in passes([job for job in jobs if job.recipe.key not in manifests]):
        made = [compute_shards(store, trunk, group, index) for index in range(group[0].shards)]
        decoded += sum(count for _, count in made)
        for position, job in enumerate(group):
            manifests[job.recipe.key] = commit_features(store, job,
                                                        [row[position] for row, _ in made])
    return [manifests[job.recipe.key] for job in jobs], decoded


def find_features(store: FeatureStore, jobs: Iterable[FeatureJob]) -> dict[str, Manifest]:
    """The finished features among the jobs, by key.

    Raises: InputError where images were left out of them and a job's on_bad_image is error.
    """
    found: dict[str, Manifest] = {}
    for job in jobs:
        manifest = found.get(job.recipe.key) or store.find(job.recipe)
        if manifest is None:
            continue
        if manifest.bad and job.on_bad_image == "error":
            name, reason = manifest.bad[0]
            raise InputError(f"image {name} {reason}; {len(manifest.bad)} such images were left "
                             f"out of the stored features of task {job.task!r}: mend them, or "
                             "allow that with on_bad_image skip")
        found[job.recipe.key] = manifest
    return found


def check_trunk(trunk: Trunk, jobs: Iterable[FeatureJob]) -> None:
    """Raises ValueError where a job is of another trunk."""
    fingerprints: dict[int, str] = {}
    for job in jobs:
        if job.depth not in fingerprints:
            fingerprints[job.depth] = trunk.upto(job.depth).fingerprint()
        if job.recipe.trunk != fingerprints[job.depth]:
            raise ValueError(f"the job of task {job.task!r} is of trunk {job.recipe.trunk[:12]}, "
                             f"not of {fingerprints[job.depth][:12]} at depth {job.depth}")


def run_trunk(trunk: Trunk, images_BCHW: Tensor) -> Tensor:
    """z_BCHW of uint8 images, computed in batches of one size whatever B is.

    A convolution may round differently for another batch size; with the last batch filled up, an
    image's features are the same bits in any company.
    """
    return run_trunk_at(trunk, {trunk.freeze_depth}, images_BCHW)[0][trunk.freeze_depth]


def run_trunk_at(trunk: Trunk, depths: Iterable[int],
                 images_BCHW: Tensor) -> tuple[dict[int, Tensor], dict[int, float]]:
    """z_BCHW at each depth, from one pass, and the seconds from the images to there; each as
    `run_trunk` gives it for that depth alone.
    """
    device = trunk.mean_C.device
    parts: dict[int, list[Tensor]] = {depth: [] for depth in depths}
    seconds = dict.fromkeys(parts, 0.0)
    deepest = max(parts)
    for chunk_BCHW in torch.split(images_BCHW, MICRO_BATCH) if len(images_BCHW) else ():
        missing = MICRO_BATCH - len(chunk_BCHW)
        start = time.perf_counter()
        filled_BCHW = torch.nn.functional.pad(chunk_BCHW, [0] * 7 + [missing])
        for depth, z_BCHW in trunk.outputs(filled_BCHW.to(device)):
            if depth in parts:
                parts[depth].append(z_BCHW[:len(chunk_BCHW)].cpu())
                seconds[depth] += time.perf_counter() - start
            if depth == deepest:
                break
    return {depth: torch.cat(chunks) if chunks else
            torch.empty(0, *feature_shape(trunk.upto(depth), images_BCHW))
            for depth, chunks in parts.items()}, seconds


def feature_shape(trunk: Trunk, images_BCHW: Tensor) -> tuple[int, ...]:
    """(C, H, W) of one image's features."""
    one_BCHW = torch.zeros(1, *images_BCHW.shape[1:], dtype=torch.uint8,
                           device=trunk.mean_C.device)
    return tuple(trunk(one_BCHW).shape[1:])
