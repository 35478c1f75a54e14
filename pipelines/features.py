"""Features of every task, computed once by Ray Data: an actor pool with the trunk loaded once each.

One row of the dataset is one shard of one split of one task. What a shard holds is decided by
`partialhn.featurise`, so a cluster writes the same bytes as a single process.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from partialhn.backbone import Trunk
from partialhn.cache import ShardCache
from partialhn.config import ComputeConfig
from partialhn.errors import InputError
from partialhn.featurise import (
    FeatureJob,
    Pass,
    check_trunk,
    commit_features,
    compute_shards,
    find_features,
    passes,
)
from partialhn.plan import described, plan
from partialhn.store import FeatureStore, Manifest, Shard, parse_shard
from pipelines.in_use import InUse
from pipelines.storage import Storage

Progress = Callable[[int, int], None]
ATTEMPTS = 3
"""Times the actors are started again after one of them died."""
HARMLESS = "has constructor arguments in the object store and max_restarts > 0"
"""Logged at every start of an actor pool; the arguments live as long as the dataset does."""


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


class Featuriser:
    """The actor: turns shards into files, and says what it wrote."""

    def __init__(self, storage: Storage, trunk: Trunk, groups: Sequence[Pass], device: str,
                 threads: int) -> None:
        torch.set_num_threads(threads)
        self.store = open_store(storage)
        self.trunk, self.groups = trunk.to(device), groups

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        group = self.groups[int(row["group"])]
        try:
            shards, decoded = compute_shards(self.store, self.trunk, group, int(row["shard"]))
        except InputError as error:  # the user's to mend: no reason for Ray to try again
            return row | {"written": "", "decoded": 0, "error": str(error)}
        written = json.dumps([dataclasses.asdict(shard) for shard in shards])
        return row | {"written": written, "decoded": decoded, "error": ""}


def compute_features(storage: Storage, trunk: Trunk, jobs: Sequence[FeatureJob], *,
                     workers: int = 1, gpu: bool = False, threads: int = 1,
                     progress: Progress | None = None, say: Callable[[str], None] | None = None,
                     in_use: InUse | None = None) -> tuple[list[Manifest], int]:
    """The manifests of all jobs, computing what is not there; and how many images were decoded.

    Jobs may ask for several depths: `trunk` is as deep as the deepest or deeper, and each image
    is decoded and goes through it once for all of them. `say` gets what they will cost before
    any is computed (`partialhn.plan`). `in_use` is told of their keys, so that
    none is pruned as long as it is held.

    Raises: InputError naming an image that cannot be read.
    """
    from ray.exceptions import RayActorError

    store = open_store(storage)
    check_trunk(trunk, jobs)
    if in_use:
        in_use.add(job.recipe.key for job in jobs)
    manifests = find_features(store, jobs)
    missing = [job for job in jobs if job.recipe.key not in manifests]
    groups = passes(missing)
    for line in described(plan(missing, trunk)) if missing and say else ():
        say(line)
    todo = [(number, index) for number, group in enumerate(groups)
            for index in range(group[0].shards)]
    shards: dict[tuple[int, int], list[Shard]] = {}
    decoded = 0
    for attempt in range(ATTEMPTS):
        shards |= _finished(store, groups, [place for place in todo if place not in shards])
        left = [place for place in todo if place not in shards]
        if not left:
            break
        try:
            for row in _start(storage, trunk, groups, left, workers, gpu, threads):
                if row["error"]:
                    raise InputError(row["error"])
                shards[int(row["group"]), int(row["shard"])] = [
                    parse_shard(fields) for fields in json.loads(row["written"])]
                decoded += int(row["decoded"])
                if progress:
                    progress(len(shards), len(todo))
        except RayActorError:  # an actor died: what it finished is kept, the rest is done again
            if attempt + 1 == ATTEMPTS:
                raise
    for number, group in enumerate(groups):
        rows = [shards[number, index] for index in range(group[0].shards)]
        for position, job in enumerate(group):
            manifests[job.recipe.key] = commit_features(store, job,
                                                        [row[position] for row in rows])
    return [manifests[job.recipe.key] for job in jobs], decoded


def _finished(store: FeatureStore, groups: Sequence[Pass],
              places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[Shard]]:
    """Places (group, shard) where some writer has finished the shards of every depth."""
    done = {}
    for number, index in places:
        found = [store.find_shard(job.recipe.key, index) for job in groups[number]]
        if None not in found:
            done[number, index] = [shard for shard in found if shard is not None]
    return done


def _start(storage: Storage, trunk: Trunk, groups: Sequence[Pass],
           todo: Sequence[tuple[int, int]], workers: int, gpu: bool,
           threads: int) -> Iterator[dict[str, Any]]:
    """Rows as shards are finished."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows its own
    context.execution_options.verbose_progress = False
    items = [{"group": number, "shard": index} for number, index in todo]
    rows = ray.data.from_items(items, override_num_blocks=min(len(todo), 16 * workers))
    written = rows.map(Featuriser, concurrency=min(workers, len(todo)), num_gpus=1 if gpu else 0,
                       fn_constructor_args=(storage, trunk, groups, "cuda" if gpu else "cpu",
                                            threads))
    with without_lines(HARMLESS):
        yield from written.iter_rows()


@contextlib.contextmanager
def without_lines(text: str) -> Iterator[None]:
    """Keeps lines with `text` from stderr, whoever writes them: Ray's C++ parts ask no logger."""
    saved, (reader, writer) = os.dup(2), os.pipe()
    os.dup2(writer, 2)
    os.close(writer)

    def forward() -> None:
        with os.fdopen(reader, "rb") as lines, os.fdopen(saved, "wb", 0) as stderr:
            for line in lines:
                if text.encode() not in line:
                    stderr.write(line)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    restore = os.dup(saved)
    try:
        yield
    finally:
        os.dup2(restore, 2)  # closes the pipe's last end, which ends the thread
        os.close(restore)
        thread.join(1)
