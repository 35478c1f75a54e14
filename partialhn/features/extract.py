"""Images to stored features, a shard at a time: the same bytes whoever computes the shard.

Jobs that differ in the depth alone are one pass: images are decoded once, the stages run once,
and features are kept at each depth that is asked for.

While a shard goes through the trunk, the next ones are read and decoded and those before it are
written, by other threads.

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
"""Shards at most that are read before the trunk is free for them."""
BEHIND, BEHIND_A_GPU = 1, 4
"""Shards at most whose features are kept while another goes through the trunk: on a CPU one thread
writes faster than the trunk calculates, and a GPU calculates faster than one thread hashes."""
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureJob:
    """One split of one task, to be turned into features at one depth."""

    task: str
    split: Split
    depth: int
    """Execution of the trunk that the images go through."""
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
Place = tuple[int, int]
"""Which pass, and which shard of it."""
Made = tuple[Place, list[Shard], int]
"""Where, the shards of the pass's jobs in their order, and how many images were decoded."""


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


def each_shard(store: FeatureStore, trunk: Trunk, groups: Sequence[Pass],
               places: Iterable[Place]) -> Iterator[Made]:
    """The shards of the places, in their order, computing those that no writer has finished.

    `trunk` is as deep as the deepest job or deeper; it is used by the caller's thread alone.

    Raises: InputError naming an image that cannot be read, where on_bad_image is error.
    """
    left, behind = iter(places), BEHIND if trunk.mean_C.device.type == "cpu" else BEHIND_A_GPU
    reading: collections.deque[concurrent.futures.Future[_Read]] = collections.deque()
    writing: collections.deque[concurrent.futures.Future[Made]] = collections.deque()
    readers = concurrent.futures.ThreadPoolExecutor(AHEAD, "shard")
    writers = concurrent.futures.ThreadPoolExecutor(behind, "shard")
    try:
        while True:
            for place in itertools.islice(left, AHEAD - len(reading)):
                reading.append(readers.submit(_read, store, groups[place[0]], place))
            if not reading:
                break
            read = reading.popleft().result()
            features = _features(trunk, read) if read.missing else None
            if len(writing) == behind:
                yield writing.popleft().result()
            writing.append(writers.submit(_write, store, read, features))
        while writing:
            yield writing.popleft().result()
    finally:  # what was computed is worth keeping whatever else went wrong
        readers.shutdown(cancel_futures=True)
        writers.shutdown()


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    """A shard before the trunk."""

    jobs: Pass
    place: Place
    found: dict[str, Shard]
    """Shards that some writer has finished, by key."""
    missing: tuple[FeatureJob, ...]
    """Jobs whose shard is to be made."""
    table: ImageTable
    """Its images, where any job misses it."""
    images: Decoded | None
    seconds: float
    """Of the processor, that reading and decoding took: the trunk runs meanwhile."""


def _read(store: FeatureStore, jobs: Pass, place: Place) -> _Read:
    _, index = place
    shards = {job.recipe.key: store.find_shard(job.recipe.key, index) for job in jobs}
    found = {key: shard for key, shard in shards.items() if shard is not None}
    missing = tuple(job for job in jobs if job.recipe.key not in found)
    first, rows = jobs[0], jobs[0].recipe.shard_rows
    start = time.thread_time()
    table = first.table.take(range(index * rows, min((index + 1) * rows, len(first.table))))
    images = decode(table, first.recipe.input_size, first.recipe.transform, first.on_bad_image,
                    first.max_image_pixels, first.recipe.seed) if missing else None
    return _Read(jobs, place, found, missing, table, images, time.thread_time() - start)


def _write(store: FeatureStore, read: _Read, features: "_Features | None") -> Made:
    shards, decoded = dict(read.found), 0
    if features is not None and read.images is not None:
        kept, ids, decoded = read.images.index_B.numpy(), read.table.ids(), len(read.table)
        for depth in list(features.views):
            start = time.perf_counter()
            z_NVCHW = torch.stack(features.views.pop(depth), 1)
            seconds = read.seconds + features.seconds[depth] + time.perf_counter() - start
            for job in read.missing:
                if job.depth == depth:
                    shards[job.recipe.key] = store.write_shard(
                        job.recipe, read.place[1], z_NVCHW, read.table.label_N[kept],
                        [ids[row] for row in kept], seconds=seconds,
                        bad=[(bad.id, bad.reason) for bad in read.images.bad])
    return read.place, [shards[job.recipe.key] for job in read.jobs], decoded


class _Features(NamedTuple):
    """What came out of the trunk, for each depth that is asked for."""

    views: dict[int, list[Tensor]]
    """z_NCHW of each view; writing takes them out, for their memory."""
    seconds: dict[int, float]
    """That it takes to get there from decoded images."""


def _features(trunk: Trunk, read: _Read) -> _Features:
    recipe, images = read.missing[0].recipe, read.images
    assert images is not None, "what is missing was read"
    rows_N = read.place[1] * recipe.shard_rows + images.index_B.numpy()
    made = _Features({job.depth: [] for job in read.missing}, {})
    plain_BCHW = images.images_BCHW.to(trunk.mean_C.device)
    for view in range(recipe.views):
        start = time.perf_counter()
        images_BCHW = augment(plain_BCHW, rows_N, len(read.missing[0].table), view,
                              cast(Augment, recipe.augment), recipe.seed)
        augmenting = time.perf_counter() - start
        z_BCHW, seconds = run_trunk_at(trunk, made.views, images_BCHW)
        for depth, views in made.views.items():
            views.append(z_BCHW[depth])
            made.seconds[depth] = made.seconds.get(depth, 0.0) + augmenting + seconds[depth]
    return made


def places_of(groups: Sequence[Pass]) -> list[Place]:
    """Every shard of every pass."""
    return [(number, index) for number, group in enumerate(groups)
            for index in range(group[0].shards)]


def commit_passes(store: FeatureStore, groups: Sequence[Pass],
                  shards: Mapping[Place, Sequence[Shard]]) -> dict[str, Manifest]:
    """Makes the features of all jobs visible, whose shards are all there: manifests by key.

    Raises: InputError, as `commit_features`.
    """
    return {job.recipe.key: commit_features(store, job, [shards[number, index][position]
                                                         for index in range(job.shards)])
            for number, group in enumerate(groups) for position, job in enumerate(group)}


def commit_features(store: FeatureStore, job: FeatureJob, shards: Sequence[Shard]) -> Manifest:
    """Makes a job's features visible once all its shards are there.

    Raises: InputError where skipping unreadable images left nothing.
    """
    if not any(shard.rows for shard in shards):
        raise InputError(f"task {job.task!r} has no readable {job.split} image: all "
                         f"{len(job.table)} were skipped; allowed: at least one")
    return store.commit(job.recipe, shards, (job.recipe.views, *job.shape_CHW))


def precompute(store: FeatureStore, trunk: Trunk, jobs: Sequence[FeatureJob],
               progress: Callable[[int, int], None] | None = None) -> tuple[list[Manifest], int]:
    """The manifests of all jobs, computed here where they are not there; images decoded.

    `trunk` is as deep as the deepest job or deeper. `progress` is called with the shards done and
    in all. Raises: InputError, as `each_shard`.
    """
    check_trunk(trunk, jobs)
    manifests = find_features(store, jobs)
    groups = passes([job for job in jobs if job.recipe.key not in manifests])
    shards, decoded = {}, 0
    places = places_of(groups)
    for place, made, count in each_shard(store, trunk, groups, places):
        shards[place] = made
        decoded += count
        if progress:
            progress(len(shards), len(places))
    manifests |= commit_passes(store, groups, shards)
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
