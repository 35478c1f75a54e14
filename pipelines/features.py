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
from typing import Any

import torch

from partialhn.backbone import Trunk
from partialhn.errors import InputError
from partialhn.featurise import FeatureJob, commit_features, compute_shard, feature_shape
from partialhn.store import FeatureStore, Manifest, Shard, parse_shard
from pipelines.storage import Storage

Progress = Callable[[int, int], None]
ATTEMPTS = 3
"""Times the actors are started again after one of them died."""
HARMLESS = "has constructor arguments in the object store and max_restarts > 0"
"""Logged at every start of an actor pool; the arguments live as long as the dataset does."""


def open_store(storage: Storage, cache: Any = None) -> FeatureStore:
    """The feature store of a storage; `cache` is a local folder for remote shards."""
    return FeatureStore(storage.filesystem, storage.root, storage.put_if_absent, cache)


class Featuriser:
    """The actor: turns shards into files, and says what it wrote."""

    def __init__(self, storage: Storage, trunk: Trunk, jobs: Sequence[FeatureJob], device: str,
                 threads: int) -> None:
        torch.set_num_threads(threads)
        self.store = open_store(storage)
        self.trunk, self.jobs = trunk.to(device), jobs

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        job = self.jobs[int(row["job"])]
        try:
            shard = compute_shard(self.store, self.trunk, job, int(row["shard"]))
        except InputError as error:  # the user's to mend: no reason for Ray to try again
            return row | {"written": "", "error": str(error)}
        return row | {"written": json.dumps(dataclasses.asdict(shard)), "error": ""}


def compute_features(storage: Storage, trunk: Trunk, jobs: Sequence[FeatureJob], *,
                     workers: int = 1, gpu: bool = False, threads: int = 1,
                     progress: Progress | None = None) -> tuple[list[Manifest], int]:
    """The manifests of all jobs, computing what is not there; and how many images were decoded.

    Raises: InputError naming an image that cannot be read.
    """
    from ray.exceptions import RayActorError

    store = open_store(storage)
    found = [store.find(job.recipe) for job in jobs]
    todo = [(number, index) for number, job in enumerate(jobs) if found[number] is None
            for index in range(job.shards)]
    shards: dict[tuple[int, int], Shard] = {}
    decoded = 0
    for attempt in range(ATTEMPTS):
        for number, index in todo:
            done = store.find_shard(jobs[number].recipe.key, index)
            if done is not None:
                shards[number, index] = done
        missing = [place for place in todo if place not in shards]
        if not missing:
            break
        try:
            for row in _start(storage, trunk, jobs, missing, workers, gpu, threads):
                if row["error"]:
                    raise InputError(row["error"])
                shard = parse_shard(json.loads(row["written"]))
                shards[int(row["job"]), int(row["shard"])] = shard
                decoded += shard.rows + len(shard.bad)
                if progress:
                    progress(len(shards), len(todo))
        except RayActorError:  # an actor died: what it finished is kept, the rest is done again
            if attempt + 1 == ATTEMPTS:
                raise
    size = jobs[0].recipe.input_size
    shape_CHW = feature_shape(trunk, torch.zeros(1, 3, size, size, dtype=torch.uint8))
    manifests = []
    for number, job in enumerate(jobs):
        manifest = found[number] or commit_features(
            store, job, [shards[number, index] for index in range(job.shards)], shape_CHW)
        manifests.append(manifest)
    return manifests, decoded


def _start(storage: Storage, trunk: Trunk, jobs: Sequence[FeatureJob],
           todo: Sequence[tuple[int, int]], workers: int, gpu: bool,
           threads: int) -> Iterator[dict[str, Any]]:
    """Rows as shards are finished."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows its own
    context.execution_options.verbose_progress = False
    items = [{"job": number, "shard": index} for number, index in todo]
    rows = ray.data.from_items(items, override_num_blocks=min(len(todo), 16 * workers))
    written = rows.map(Featuriser, concurrency=min(workers, len(todo)), num_gpus=1 if gpu else 0,
                       fn_constructor_args=(storage, trunk, list(jobs), "cuda" if gpu else "cpu",
                                            threads))
    with _without(HARMLESS):
        yield from written.iter_rows()


@contextlib.contextmanager
def _without(text: str) -> Iterator[None]:
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
