"""Features of every task, computed once, a shard at a time, by whatever runs the shards.

That is this process (`in_process`), or the actors of `pipelines.features.on_ray`. What a shard
holds is decided by `partialhn.features.extract`, so all write the same bytes.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from partialhn.config import ComputeConfig
from partialhn.features.cache import ShardCache
from partialhn.features.cost import described, plan
from partialhn.features.extract import (
    FeatureJob,
    Made,
    Pass,
    Place,
    check_trunk,
    commit_passes,
    each_shard,
    find_features,
    passes,
    places_of,
)
from partialhn.features.manifest import Manifest, Shard
from partialhn.features.store import FeatureStore
from partialhn.networks.trunk import Trunk
from pipelines.features.in_use import InUse
from pipelines.platform.storage import Storage

Progress = Callable[[int, int], None]
Run = Callable[[Storage, Trunk, Sequence[Pass], Sequence[Place]], Iterator[Made]]
"""Computes the shards of the places, in any order. Raises: InputError, as `each_shard`."""


def open_store(storage: Storage, compute: ComputeConfig | None = None) -> FeatureStore:
    """The feature store of a storage. `compute` says where this machine keeps copies of remote
    shards; without it remote shards are written and found, and cannot be read.
    """
    cache = None
    if compute and not storage.is_local:
        cache = ShardCache(cache_folder(compute), int(compute.cache_gib * 2**30))
    return FeatureStore(storage.filesystem, storage.root, storage.put_if_absent, cache)


def cache_folder(compute: ComputeConfig) -> Path:
    """Where a machine keeps copies of remote features."""
    return (Path(compute.cache).expanduser() if compute.cache
            else Path.home() / ".cache" / "partialhn" / "features")


def compute_features(storage: Storage, trunk: Trunk, jobs: Sequence[FeatureJob], run: Run, *,
                     progress: Progress | None = None, log: Callable[[str], None] | None = None,
                     in_use: InUse | None = None) -> tuple[list[Manifest], int]:
    """The manifests of all jobs, computing by `run` what is not there; and how many images were
    decoded.

    Jobs may ask for several depths: `trunk` is as deep as the deepest or deeper, and each image
    is decoded and goes through it once for all of them. `log` gets what they will cost before
    any is computed (`partialhn.features.cost`). `in_use` is told of their keys, so that
    none is pruned as long as it is held.

    Raises: InputError naming an image that cannot be read.
    """
    store = open_store(storage)
    check_trunk(trunk, jobs)
    if in_use:
        in_use.add(job.recipe.key for job in jobs)
    manifests = find_features(store, jobs)
    missing = [job for job in jobs if job.recipe.key not in manifests]
    groups = passes(missing)
    if missing and log:
        for line in described(plan(missing, trunk)):
            log(line)
    todo = places_of(groups)
    shards = _finished(store, groups, todo)
    decoded = 0
    if left := [place for place in todo if place not in shards]:
        for place, made, count in run(storage, trunk, groups, left):
            shards[place] = made
            decoded += count
            if progress:
                progress(len(shards), len(todo))
    manifests |= commit_passes(store, groups, shards)
    return [manifests[job.recipe.key] for job in jobs], decoded


def in_process(device: torch.device | str = "cpu") -> Run:
    """Computes shards here."""
    def run(storage: Storage, trunk: Trunk, groups: Sequence[Pass],
            places: Sequence[Place]) -> Iterator[Made]:
        return each_shard(open_store(storage), copy.deepcopy(trunk).to(device), groups, places)
    return run


def _finished(store: FeatureStore, groups: Sequence[Pass],
              places: Sequence[Place]) -> dict[Place, list[Shard]]:
    """Places where some writer has finished the shards of every depth."""
    done = {}
    for number, index in places:
        found = [store.find_shard(job.recipe.key, index) for job in groups[number]]
        if None not in found:
            done[number, index] = [shard for shard in found if shard is not None]
    return done
