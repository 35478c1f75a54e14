"""Turns images into stored features, shard by shard; the bytes do not depend on who computes them.

Jobs on the same images that differ in the depth or in the stored number type form a group: images
are decoded once, the network's stages run once, and features are stored at each depth required.

While one piece of a shard goes through the trunk, other threads read and decode the next pieces
and write the shards before.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor

from partialhn.config import Augment, Config
from partialhn.data.augment import augment
from partialhn.data.decode import BadImage, Decoded, decode_images
from partialhn.data.experience import Experience
from partialhn.data.image_table import ImageTable
from partialhn.errors import InputError
from partialhn.features.codec import DTYPES
from partialhn.features.manifest import FeatureRecipe, Manifest, Shard
from partialhn.features.store import FeatureStore
from partialhn.networks.trunk import MICRO_BATCH, Trunk, feature_shape, run_trunk_at
from partialhn.pixels import Pixels

READERS = 4
"""Threads that read and decode ahead of the trunk."""
MOST_AHEAD, BYTES_AHEAD = 16, 128 * 1024 ** 2
"""Largest number of pieces that are decoded ahead of the trunk, and bytes of their pixels."""
BEHIND, BEHIND_A_GPU = 1, 4
"""Largest number of shards that wait to be written while another goes through the trunk: on a CPU
one thread writes faster than the trunk computes, but a GPU computes faster than one thread
hashes."""
Item = TypeVar("Item")
Done = TypeVar("Done")
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


def compute_shards(store: FeatureStore, trunk: Trunk, groups: Sequence[JobGroup],
                   places: Iterable[ShardPlace]) -> Iterator[ShardResult]:
    """Yields the shards of the places, in order; computes those that no writer has finished.

    `trunk` must be at least as deep as the deepest job; only the caller's thread uses it.

    Raises: InputError naming an image that cannot be read, if on_bad_image is error.
    """
    behind = BEHIND if trunk.mean_C.device.type == "cpu" else BEHIND_A_GPU
    writing: collections.deque[concurrent.futures.Future[ShardResult]] = collections.deque()
    readers = concurrent.futures.ThreadPoolExecutor(READERS, "shard")
    writers = concurrent.futures.ThreadPoolExecutor(behind, "shard")
    try:
        shards = ahead(readers, lambda place: _Shard(store, groups[place[0]], place), places,
                       READERS)
        pieces = ((shard, piece) for _, shard in shards for piece in shard.pieces())
        for (shard, piece), images in ahead(readers, lambda at: at[0].decode(at[1]), pieces,
                                            _pieces_ahead(groups)):
            if images is not None:
                shard.compute(trunk, piece, images)
            if piece.stop >= len(shard.table):
                if len(writing) == behind:
                    yield writing.popleft().result()
                writing.append(writers.submit(shard.write, store))
        while writing:
            yield writing.popleft().result()
    finally:  # shards that were computed are still written, whatever else went wrong
        readers.shutdown(cancel_futures=True)
        writers.shutdown()


def ahead(pool: concurrent.futures.Executor, work: Callable[[Item], Done], items: Iterable[Item],
          count: int) -> Iterator[tuple[Item, Done]]:
    """Yields each item with its result, in order, while the pool works on the next `count`."""
    pending: collections.deque[tuple[Item, concurrent.futures.Future[Done]]] = collections.deque()
    rest = iter(items)
    while True:
        for item in itertools.islice(rest, count - len(pending)):
            pending.append((item, pool.submit(work, item)))
        if not pending:
            return
        item, future = pending.popleft()
        yield item, future.result()


def _pieces_ahead(groups: Sequence[JobGroup]) -> int:
    """Number of pieces to decode ahead of the trunk, by the bytes of their pixels."""
    side = max((group[0].recipe.input_size for group in groups), default=1)
    return max(READERS, min(MOST_AHEAD, BYTES_AHEAD // (MICRO_BATCH * 3 * side * side)))


class _Shard:
    """One shard of a group of jobs on its way: it is decoded, computed and written in pieces.

    A piece is the rows that go through the trunk at once. So neither the pixels of a shard nor its
    features as float32 are in memory as a whole, unless int8 needs them for its scales.
    """

    def __init__(self, store: FeatureStore, jobs: JobGroup, place: ShardPlace) -> None:
        self.jobs, self.place = jobs, place
        shards = {job.recipe.key: store.find_shard(job.recipe.key, place[1]) for job in jobs}
        self.finished = {key: shard for key, shard in shards.items() if shard is not None}
        """Shards that some writer has finished, by key."""
        self.missing = tuple(job for job in jobs if job.recipe.key not in self.finished)
        """Jobs whose shard is still to be computed."""
        recipe = jobs[0].recipe
        self.first = place[1] * recipe.shard_rows
        """Row of the shard's first image in the table of the split."""
        rows = range(self.first, min(self.first + recipe.shard_rows, len(jobs[0].table)))
        self.table = jobs[0].table.take(rows)
        self.seconds = 0.0
        """Processor seconds for reading and decoding (not wall time: the trunk runs meanwhile)."""
        self._features = {job.depth: _Features(self.missing, job.depth, len(self.table))
                          for job in self.missing}
        self._kept: list[int] = []
        self._bad: list[BadImage] = []
        self._reading = threading.Lock()

    def pieces(self) -> Iterator[range]:
        """The rows of each piece; a single piece where nothing is missing."""
        step = MICRO_BATCH if self.missing else len(self.table)
        for start in range(0, len(self.table), step):
            yield range(start, min(start + step, len(self.table)))

    def decode(self, rows: range) -> Decoded | None:
        """The images of a piece; None if no job is missing the shard."""
        if not self.missing:
            return None
        job, start = self.missing[0], time.thread_time()
        part = self.table.take(rows)
        images = decode_images(self._encoded(rows, part), part.ids(), job.recipe.input_size,
                               job.recipe.transform, job.on_bad_image, job.max_image_pixels,
                               job.recipe.seed, job.recipe.pixels)
        with self._reading:
            self.seconds += time.thread_time() - start
        return images

    def _encoded(self, rows: range, part: ImageTable) -> Sequence[bytes]:
        """Encoded images of a piece. Files are read piece by piece; Parquet, where a row group is
        read as a whole anyway, once for the shard.
        """
        if part.one_file_each:
            return part.read()
        with self._reading:
            return self._shard_bytes[rows.start:rows.stop]

    @functools.cached_property
    def _shard_bytes(self) -> list[bytes]:
        return self.table.read()

    def compute(self, trunk: Trunk, rows: range, images: Decoded) -> None:
        """Sends a piece through the trunk; pieces come in order."""
        job = self.missing[0]
        kept = images.index_B.numpy() + rows.start
        self._kept += kept.tolist()
        self._bad += images.bad
        plain_BCHW = images.images_BCHW.to(trunk.mean_C.device)
        for view in range(job.recipe.views):
            start = time.perf_counter()
            images_BCHW = augment(plain_BCHW, self.first + kept, len(job.table), view,
                                  cast(Augment, job.recipe.augment), job.recipe.seed)
            augmenting = time.perf_counter() - start
            z_BCHW, seconds = run_trunk_at(trunk, self._features, images_BCHW)
            for depth, features in self._features.items():
                features.add(view, z_BCHW[depth], augmenting + seconds[depth])

    def write(self, store: FeatureStore) -> ShardResult:
        """Writes the missing shards, and forgets their features."""
        shards, ids, decoded = dict(self.finished), self.table.ids(), 0
        for depth in list(self._features):
            features = self._features.pop(depth)
            start = time.perf_counter()
            z_NVCHW = features.whole()
            seconds = self.seconds + features.seconds + time.perf_counter() - start
            decoded = len(self.table)
            for job in self.missing:
                if job.depth == depth:
                    shards[job.recipe.key] = store.write_shard(
                        job.recipe, self.place[1], z_NVCHW, self.table.label_N[self._kept],
                        [ids[row] for row in self._kept], seconds=seconds,
                        bad=[(bad.id, bad.reason) for bad in self._bad])
        return self.place, [shards[job.recipe.key] for job in self.jobs], decoded


class _Features:
    """The features of a shard at one depth, as its pieces come."""

    def __init__(self, jobs: Iterable[FeatureJob], depth: int, rows: int) -> None:
        """rows: images of the shard, readable or not."""
        ours = [job for job in jobs if job.depth == depth]
        kinds = {DTYPES[job.recipe.dtype][0] for job in ours}
        self.kind = (kinds.pop() if len(kinds) == 1 and torch.int8 not in kinds
                     else torch.float32)
        """The stored number type, where no job needs another one or a scale over the shard."""
        self.seconds = 0.0
        self._shape = (rows, ours[0].recipe.views, *ours[0].shape_CHW)
        self._z_NVCHW: Tensor | None = None
        """None until the first piece comes: shards are decoded ahead of the trunk."""
        self._used = [0] * ours[0].recipe.views

    def add(self, view: int, z_BCHW: Tensor, seconds: float) -> None:
        """Takes one view of the next piece; seconds are those from its images on."""
        if self._z_NVCHW is None:
            self._z_NVCHW = torch.empty(self._shape, dtype=self.kind)
        used = self._used[view] + len(z_BCHW)
        self._z_NVCHW[self._used[view]:used, view] = z_BCHW
        self._used[view] = used
        self.seconds += seconds

    def whole(self) -> Tensor:
        """z_NVCHW of all pieces."""
        if self._z_NVCHW is None:  # a shard without a row
            return torch.empty(0, *self._shape[1:], dtype=self.kind)
        return self._z_NVCHW[:self._used[0]]


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
