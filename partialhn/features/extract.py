"""The work of turning images into stored features: jobs, groups of jobs, and their manifests.

Jobs on the same images that differ in the depth or in the stored number type form a group: images
are decoded once, the network's stages run once, and features are stored at each depth required.
`partialhn.features.shards` computes them.

Legend: N images, V views, C channels, H W spatial.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.data.image_table import ImageTable
from partialhn.errors import InputError
from partialhn.features.jobs import SPLITS, FeatureJob, JobGroup, ShardPlace, Split
from partialhn.features.manifest import FeatureRecipe, Manifest, Shard
from partialhn.features.shards import compute_shards
from partialhn.features.store import FeatureStore
from partialhn.networks.trunk import Trunk, feature_shape
from partialhn.numbers import counted
from partialhn.pixels import Pixels


def feature_jobs(config: Config, experiences: Sequence[Experience], trunk: Trunk,
                 depths: Sequence[int] | None = None) -> list[FeatureJob]:
    """A job for every split of every task that has images, in order.

    Training images get all views, others one. depths: those to compute, none deeper than `trunk`;
    by default the trunk's own.
    """
    size = config.data.input_size
    images_BCHW = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    jobs = []
    for depth in depths or (trunk.freeze_depth,):
        cut = trunk.upto(depth)
        fingerprint, shape_CHW = cut.fingerprint(), feature_shape(cut, images_BCHW)
        jobs += [FeatureJob(experience.name, split, depth, shape_CHW,
                            _recipe(config, experience, split, fingerprint, trunk.pixels), table,
                            config.data.on_bad_image, config.data.max_image_pixels)
                 for experience in experiences for split in SPLITS
                 if len(table := getattr(experience, split))]
    return jobs


def _recipe(config: Config, experience: Experience, split: Split, trunk: str,
            pixels: Pixels) -> FeatureRecipe:
    views = config.features.views if split == "train" else 1
    table: ImageTable = getattr(experience, split)
    return FeatureRecipe(trunk, table.fingerprint(), experience.transform, config.data.input_size,
                         views, config.features.augment if views > 1 else "none",
                         config.data.stream_seed, config.features.feature_dtype,
                         config.features.shard_rows, config.features.compression,
                         pixels.interpolation, pixels.crop, pixels.squash)


def group_jobs(jobs: Sequence[FeatureJob]) -> list[JobGroup]:
    """Groups jobs that differ only in depth, number type or compression; drops duplicates."""
    groups: dict[FeatureRecipe, dict[str, FeatureJob]] = {}
    for job in jobs:
        common = dataclasses.replace(job.recipe, trunk="", dtype="", compression="")
        groups.setdefault(common, {}).setdefault(job.recipe.key, job)
    return [tuple(group.values()) for group in groups.values()]


def shard_places(groups: Sequence[JobGroup]) -> list[ShardPlace]:
    """The place of every shard of every group."""
    return [(number, index) for number, group in enumerate(groups)
            for index in range(group[0].shards)]


def commit_groups(store: FeatureStore, groups: Sequence[JobGroup],
                  shards: Mapping[ShardPlace, Sequence[Shard]]) -> dict[str, Manifest]:
    """Commits the features of all jobs, given all their shards; returns the manifests by key.

    Raises: InputError, as `commit_features`.
    """
    return {job.recipe.key: commit_features(store, job, [shards[number, index][position]
                                                         for index in range(job.shards)])
            for number, group in enumerate(groups) for position, job in enumerate(group)}


def commit_features(store: FeatureStore, job: FeatureJob, shards: Sequence[Shard]) -> Manifest:
    """Writes the manifest of a job whose shards are all written; readers then find its features.

    Raises: InputError if every image was unreadable and skipped.
    """
    if not any(shard.rows for shard in shards):
        raise InputError(f"task {job.task!r} has no readable {job.split} image: all "
                         f"{len(job.table)} were skipped; allowed: at least one")
    return store.commit(job.recipe, shards, (job.recipe.views, *job.shape_CHW))


def precompute(store: FeatureStore, trunk: Trunk, jobs: Sequence[FeatureJob],
               progress: Callable[[int, int], None] | None = None,
               say: Callable[[str], None] = warnings.warn) -> tuple[list[Manifest], int]:
    """Computes missing features in this process; returns all manifests and the images decoded.

    `trunk` must be at least as deep as the deepest job. `progress` is called with the number of
    shards done and of all shards. `say` gets lines for the user. Raises: InputError, as
    `compute_shards`.
    """
    check_trunk(trunk, jobs)
    manifests = find_features(store, jobs)
    groups = group_jobs([job for job in jobs if job.recipe.key not in manifests])
    shards, decoded = {}, 0
    places = shard_places(groups)
    for place, finished, count in compute_shards(store, trunk, groups, places, say=say):
        shards[place] = finished
        decoded += count
        if progress:
            progress(len(shards), len(places))
    manifests |= commit_groups(store, groups, shards)
    return [manifests[job.recipe.key] for job in jobs], decoded


def find_features(store: FeatureStore, jobs: Iterable[FeatureJob]) -> dict[str, Manifest]:
    """The manifests of the jobs whose features are finished, by key.

    Raises: InputError if images were left out of them and the job's on_bad_image is error.
    """
    manifests: dict[str, Manifest] = {}
    for job in jobs:
        manifest = manifests.get(job.recipe.key) or store.find(job.recipe)
        if manifest is None:
            continue
        if manifest.bad and job.on_bad_image == "error":
            name, reason = manifest.bad[0]
            raise InputError(f"image {name} {reason}; the stored features of task {job.task!r} "
                             f"leave out {counted(len(manifest.bad), 'such image')}: repair them, "
                             "or allow that with --on-bad-image skip (in a configuration: "
                             "data.on_bad_image)")
        manifests[job.recipe.key] = manifest
    return manifests


def check_trunk(trunk: Trunk, jobs: Iterable[FeatureJob]) -> None:
    """Raises ValueError if a job belongs to another trunk."""
    fingerprints: dict[int, str] = {}
    for job in jobs:
        if job.depth not in fingerprints:
            fingerprints[job.depth] = trunk.upto(job.depth).fingerprint()
        if job.recipe.trunk != fingerprints[job.depth]:
            raise ValueError(f"the job of task {job.task!r} needs trunk {job.recipe.trunk[:12]}, "
                             f"not {fingerprints[job.depth][:12]} at depth {job.depth}")
