"""Features of every task, computed once by Ray Data: an actor pool with the trunk loaded once each.

One row of the dataset is one shard of one split of one task. What a shard holds is decided by
`partialhn.featurise`, so a cluster writes the same bytes as a single process.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from partialhn.backbone import Trunk
from partialhn.errors import InputError
from partialhn.featurise import FeatureJob, commit_features, compute_shard, feature_shape
from partialhn.store import FeatureStore, Manifest, Shard, parse_shard
from pipelines.storage import Storage

Progress = Callable[[int, int], None]


def open_store(storage: Storage, cache: Any = None) -> FeatureStore:
    """The feature store of a storage; `cache` is a local folder for remote shards."""
    return FeatureStore(storage.filesystem, storage.root, storage.put_if_absent, cache)


class Featuriser:
    """The actor: turns shards into files, and says what it wrote."""

    def __init__(self, shared: Sequence[Any], device: str, threads: int) -> None:
        """`shared` holds a reference to (storage, trunk, jobs), fetched once an actor."""
        import ray

        storage, trunk, jobs = ray.get(shared[0])
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
    store = open_store(storage)
    found = [store.find(job.recipe) for job in jobs]
    shards: dict[tuple[int, int], Shard] = {}
    todo: list[dict[str, int]] = []
    for number, job in enumerate(jobs):
        if found[number] is None:
            for index in range(job.shards):
                done = store.find_shard(job.recipe.key, index)
                if done is None:
                    todo.append({"job": number, "shard": index})
                else:
                    shards[number, index] = done
    decoded = 0
    if todo:
        pool = _start(storage, trunk, jobs, todo, workers, gpu, threads)
        for count, row in enumerate(pool.iter_rows(), start=1):
            if row["error"]:
                raise InputError(row["error"])
            shard = parse_shard(json.loads(row["written"]))
            shards[int(row["job"]), int(row["shard"])] = shard
            decoded += shard.rows + len(shard.bad)
            if progress:
                progress(count, len(todo))
    size = jobs[0].recipe.input_size
    shape_CHW = feature_shape(trunk, torch.zeros(1, 3, size, size, dtype=torch.uint8))
    manifests = []
    for number, job in enumerate(jobs):
        manifest = found[number] or commit_features(
            store, job, [shards[number, index] for index in range(job.shards)], shape_CHW)
        manifests.append(manifest)
    return manifests, decoded


def _start(storage: Storage, trunk: Trunk, jobs: Sequence[FeatureJob],
           todo: Sequence[dict[str, int]], workers: int, gpu: bool, threads: int) -> Any:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows its own
    context.execution_options.verbose_progress = False
    rows = ray.data.from_items(list(todo), override_num_blocks=min(len(todo), 16 * workers))
    shared = ray.put((storage, trunk, list(jobs)))
    return rows.map(Featuriser, concurrency=min(workers, len(todo)), num_gpus=1 if gpu else 0,
                    fn_constructor_args=([shared], "cuda" if gpu else "cpu", threads))
