"""Turns images into stored features, shard by shard; the bytes do not depend on who computes them.

Jobs on the same images that differ in the depth or in the stored number type form a group: images
are decoded once, the network's stages run once, and features are stored at each depth required.

While one shard goes through the trunk, other threads read and decode the next shards and write
the ones before.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from partialhn.config import Augment, Config
from partialhn.data.augment import augment
from partialhn.data.decode import Decoded, decode
from partialhn.data.experience import Experience
from partialhn.data.image_table import ImageTable
from partialhn.errors import InputError
from partialhn.features.manifest import FeatureRecipe, Manifest, Shard
from partialhn.features.store import FeatureStore
from partialhn.networks.trunk import Trunk, feature_shape, run_trunk_at

AHEAD = 4
"""Largest number of shards that are read ahead of the trunk."""
BEHIND, BEHIND_A_GPU = 1, 4
"""Largest number of shards that wait to be written while another goes through the trunk: on a CPU
one thread writes faster than the trunk computes, but a GPU computes faster than one thread
hashes."""
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


def group_jobs(jobs: Sequence[FeatureJob]) -> list[JobGroup]:
    """Groups jobs that differ only in depth, number type or compression; drops duplicates."""
    groups: dict[FeatureRecipe, dict[str, FeatureJob]] = {}
    for job in jobs:
        common = dataclasses.replace(job.recipe, trunk="", dtype="", compression="")
        groups.setdefault(common, {}).setdefault(job.recipe.key, job)
    return [tuple(group.values()) for group in groups.values()]


def compute_shards(store: FeatureStore, trunk: Trunk, groups: Sequence[JobGroup],
                   places: Iterable[ShardPlace]) -> Iterator[ShardResult]:
    """Yields the shards of the places, in order; computes those that no writer has finished.

    `trunk` must be at least as deep as the deepest job; only the caller's thread uses it.

    Raises: InputError naming an image that cannot be read, if on_bad_image is error.
    """
    pending = iter(places)
    behind = BEHIND if trunk.mean_C.device.type == "cpu" else BEHIND_A_GPU
    reading: collections.deque[concurrent.futures.Future[_ShardInput]] = collections.deque()
    writing: collections.deque[concurrent.futures.Future[ShardResult]] = collections.deque()
    readers = concurrent.futures.ThreadPoolExecutor(AHEAD, "shard")
    writers = concurrent.futures.ThreadPoolExecutor(behind, "shard")
    try:
        while True:
            for place in itertools.islice(pending, AHEAD - len(reading)):
                reading.append(readers.submit(_read_shard, store, groups[place[0]], place))
            if not reading:
                break
            source = reading.popleft().result()
            features = _compute_features(trunk, source) if source.missing else None
            if len(writing) == behind:
                yield writing.popleft().result()
            writing.append(writers.submit(_write_shard, store, source, features))
        while writing:
            yield writing.popleft().result()
    finally:  # shards that were computed are still written, whatever else went wrong
        readers.shutdown(cancel_futures=True)
        writers.shutdown()


@dataclasses.dataclass(frozen=True, eq=False)
class _ShardInput:
    """One shard of a group of jobs, before its images go through the trunk."""

    jobs: JobGroup
    place: ShardPlace
    finished: dict[str, Shard]
    """Shards that some writer has finished, by key."""
    missing: tuple[FeatureJob, ...]
    """Jobs whose shard is still to be computed."""
    table: ImageTable
    """The shard's images."""
    images: Decoded | None
    """The decoded images; None if no job is missing its shard."""
    seconds: float
    """Processor seconds for reading and decoding (not wall time: the trunk runs meanwhile)."""


def _read_shard(store: FeatureStore, jobs: JobGroup, place: ShardPlace) -> _ShardInput:
    _, index = place
    shards = {job.recipe.key: store.find_shard(job.recipe.key, index) for job in jobs}
    finished = {key: shard for key, shard in shards.items() if shard is not None}
    missing = tuple(job for job in jobs if job.recipe.key not in finished)
    first, rows = jobs[0], jobs[0].recipe.shard_rows
    start = time.thread_time()
    table = first.table.take(range(index * rows, min((index + 1) * rows, len(first.table))))
    images = decode(table, first.recipe.input_size, first.recipe.transform, first.on_bad_image,
                    first.max_image_pixels, first.recipe.seed) if missing else None
    return _ShardInput(jobs, place, finished, missing, table, images, time.thread_time() - start)


def _write_shard(store: FeatureStore, source: _ShardInput,
                 features: "_ShardFeatures | None") -> ShardResult:
    shards, decoded = dict(source.finished), 0
    if features is not None and source.images is not None:
        kept, ids, decoded = source.images.index_B.numpy(), source.table.ids(), len(source.table)
        for depth in list(features.views):
            start = time.perf_counter()
            z_NVCHW = torch.stack(features.views.pop(depth), 1)
            seconds = source.seconds + features.seconds[depth] + time.perf_counter() - start
            for job in source.missing:
                if job.depth == depth:
                    shards[job.recipe.key] = store.write_shard(
                        job.recipe, source.place[1], z_NVCHW, source.table.label_N[kept],
                        [ids[row] for row in kept], seconds=seconds,
                        bad=[(bad.id, bad.reason) for bad in source.images.bad])
    return source.place, [shards[job.recipe.key] for job in source.jobs], decoded


class _ShardFeatures(NamedTuple):
    """The trunk's output for one shard, at each depth required."""

    views: dict[int, list[Tensor]]
    """For each depth, z_NCHW of each view; the writer removes them to free their memory."""
    seconds: dict[int, float]
    """For each depth, seconds from decoded images to its features."""


def _compute_features(trunk: Trunk, source: _ShardInput) -> _ShardFeatures:
    recipe, images = source.missing[0].recipe, source.images
    assert images is not None, "the images of missing shards are decoded"
    rows_N = source.place[1] * recipe.shard_rows + images.index_B.numpy()
    features = _ShardFeatures({job.depth: [] for job in source.missing}, {})
    plain_BCHW = images.images_BCHW.to(trunk.mean_C.device)
    for view in range(recipe.views):
        start = time.perf_counter()
        images_BCHW = augment(plain_BCHW, rows_N, len(source.missing[0].table), view,
                              cast(Augment, recipe.augment), recipe.seed)
        augmenting = time.perf_counter() - start
        z_BCHW, seconds = run_trunk_at(trunk, features.views, images_BCHW)
        for depth, views in features.views.items():
            views.append(z_BCHW[depth])
            features.seconds[depth] = (features.seconds.get(depth, 0.0) + augmenting
                                       + seconds[depth])
    return features


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
               progress: Callable[[int, int], None] | None = None) -> tuple[list[Manifest], int]:
    """Computes missing features in this process; returns all manifests and the images decoded.

    `trunk` must be at least as deep as the deepest job. `progress` is called with the number of
    shards done and of all shards. Raises: InputError, as `compute_shards`.
    """
    check_trunk(trunk, jobs)
    manifests = find_features(store, jobs)
    groups = group_jobs([job for job in jobs if job.recipe.key not in manifests])
    shards, decoded = {}, 0
    places = shard_places(groups)
    for place, finished, count in compute_shards(store, trunk, groups, places):
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
            raise InputError(f"image {name} {reason}; {len(manifest.bad)} such images were left "
                             f"out of the stored features of task {job.task!r}: repair them, or "
                             "allow that with on_bad_image skip")
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
