"""Computes the features of every task once, shard by shard.

A `Run` computes the shards: in this process (`in_process`), or in Ray actors
(`pipelines.features.on_ray`). All use `partialhn.features.extract`, so they write the same bytes.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from partialhn.config import ComputeConfig
from partialhn.features.cache import ShardCache
from partialhn.features.cost import described, plan
from partialhn.features.extract import (
    check_trunk,
    commit_groups,
    find_features,
    group_jobs,
    shard_places,
)
from partialhn.features.jobs import FeatureJob, JobGroup, ShardPlace, ShardResult
from partialhn.features.manifest import Manifest, Shard
from partialhn.features.shards import compute_shards
from partialhn.features.store import FeatureStore
from partialhn.networks.trunk import Trunk
from pipelines.features.in_use import InUse
from pipelines.platform.disk import check_room
from pipelines.platform.storage import Storage

Progress = Callable[[int, int], None]
Say = Callable[[str], None]
Run = Callable[[Storage, Trunk, Sequence[JobGroup], Sequence[ShardPlace], Say],
               Iterator[ShardResult]]
"""A function that computes the shards of the places, in any order. It passes lines for the user to
the last argument.

Raises: InputError, as `compute_shards`."""


def open_store(storage: Storage, compute: ComputeConfig | None = None) -> FeatureStore:
    """The feature store of a storage.

    `compute` names this machine's cache for copies of remote shards; without it, remote shards can
    be written and found but not read.
    """
    cache = None
    if compute and not storage.is_local:
        cache = ShardCache(cache_folder(compute), int(compute.cache_gib * 2**30))
    return FeatureStore(storage.filesystem, storage.root, storage.put_if_absent, cache)


def cache_folder(compute: ComputeConfig) -> Path:
    """Folder where this machine keeps copies of remote features."""
    return (Path(compute.cache).expanduser() if compute.cache
            else Path.home() / ".cache" / "partialhn" / "features")


def compute_features(storage: Storage, trunk: Trunk, jobs: Sequence[FeatureJob], run: Run, *,
                     progress: Progress | None = None, log: Say | None = None,
                     say: Say = warnings.warn,
                     in_use: InUse | None = None) -> tuple[list[Manifest], int]:
    """Computes missing features with `run`; returns all manifests, and how many images it decoded.

    Jobs may have several depths: `trunk` must be at least as deep as the deepest, and each image is
    decoded and sent through it once for all depths. `log` gets the expected cost before anything
    is computed (`partialhn.features.cost`). `say` gets what the user should know, each line once:
    where the device has no memory for so many images at once. `in_use` records the keys, so that
    the features are not pruned while it is held.

    Raises: InputError naming an image that cannot be read.
    """
    store = open_store(storage)
    check_trunk(trunk, jobs)
    if in_use:
        in_use.add(job.recipe.key for job in jobs)
    manifests = find_features(store, jobs)
    missing = [job for job in jobs if job.recipe.key not in manifests]
    groups = group_jobs(missing)
    if missing and log:
        plans = plan(missing, trunk)
        for line in described(plans):
            log(line)
        if line := check_room(storage, sum(row.bytes for row in plans), "the features"):
            log(line)
    todo = shard_places(groups)
    shards = _finished(store, groups, todo)
    decoded, said = 0, set[str]()

    def say_once(line: str) -> None:  # workers with equal devices find the same
        if line not in said:
            said.add(line)
            say(line)

    if unfinished := [place for place in todo if place not in shards]:
        for place, written, count in run(storage, trunk, groups, unfinished, say_once):
            shards[place] = written
            decoded += count
            if progress:
                progress(len(shards), len(todo))
    manifests |= commit_groups(store, groups, shards)
    return [manifests[job.recipe.key] for job in jobs], decoded


def in_process(device: torch.device | str = "cpu") -> Run:
    """A `Run` that computes shards in this process."""
    def run(storage: Storage, trunk: Trunk, groups: Sequence[JobGroup],
            places: Sequence[ShardPlace], say: Say) -> Iterator[ShardResult]:
        return compute_shards(open_store(storage), copy.deepcopy(trunk).to(device), groups, places,
                              say=say)
    return run


def _finished(store: FeatureStore, groups: Sequence[JobGroup],
              places: Sequence[ShardPlace]) -> dict[ShardPlace, list[Shard]]:
    """The shards of every place where some writer has finished the shards of all jobs."""
    finished = {}
    for number, index in places:
        shards = [store.find_shard(job.recipe.key, index) for job in groups[number]]
        if None not in shards:
            finished[number, index] = [shard for shard in shards if shard is not None]
    return finished
