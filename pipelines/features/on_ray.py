"""Computes feature shards with Ray Data: a pool of actors, each of which loads the trunk once.

One row of the Ray dataset is one shard of one group of jobs.
"""

import contextlib
import dataclasses
import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from partialhn.errors import InputError
from partialhn.features.jobs import JobGroup, ShardPlace, ShardResult
from partialhn.features.manifest import parse_shard
from partialhn.features.shards import compute_shards
from partialhn.networks.precision import configure_torch
from partialhn.networks.trunk import Trunk
from pipelines.features.produce import Run, open_store
from pipelines.platform.storage import Storage

ATTEMPTS = 3
"""How often a pool of actors is started before the death of an actor is an error."""
TOGETHER = 8
"""Largest number of shards that an actor gets at once, so that it can read and write some while
another is in the trunk."""
HARMLESS = "has constructor arguments in the object store and max_restarts > 0"
"""Part of a warning at every start of an actor pool; harmless, because the arguments live as long
as the dataset."""


class Featuriser:
    """The actor: computes and writes shards, and returns their records."""

    def __init__(self, storage: Storage, trunk: Trunk, groups: Sequence[JobGroup], device: str,
                 threads: int) -> None:
        configure_torch(threads)
        self.store = open_store(storage)
        self.trunk, self.groups = trunk.to(device), groups

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        places = list(zip(batch["group"].tolist(), batch["shard"].tolist(), strict=True))
        try:
            for (group, index), shards, decoded in compute_shards(self.store, self.trunk,
                                                                  self.groups, places):
                written = json.dumps([dataclasses.asdict(shard) for shard in shards])
                yield _row(group, index, written, decoded, "")
        except InputError as error:  # only the user can correct it, so Ray must not try again
            yield _row(*places[0], "", 0, str(error))


def _row(group: int, shard: int, written: str, decoded: int, error: str) -> dict[str, Any]:
    """A batch of one row, as Ray Data expects it."""
    return {"group": [group], "shard": [shard], "written": [written], "decoded": [decoded],
            "error": [error]}


def on_ray(workers: int = 1, gpu: bool = False, threads: int = 1) -> Run:
    """A `Run` with that many actors; if one dies, its unfinished shards are computed again."""
    def run(storage: Storage, trunk: Trunk, groups: Sequence[JobGroup],
            places: Sequence[ShardPlace]) -> Iterator[ShardResult]:
        from ray.exceptions import RayActorError

        unfinished = dict.fromkeys(places)
        for attempt in range(ATTEMPTS):
            try:
                for row in _start(storage, trunk, groups, tuple(unfinished), workers, gpu,
                                  threads):
                    if row["error"]:
                        raise InputError(row["error"])
                    place = int(row["group"]), int(row["shard"])
                    unfinished.pop(place, None)
                    yield (place, [parse_shard(fields) for fields in json.loads(row["written"])],
                           int(row["decoded"]))
                return
            except RayActorError:  # the next actor finds a written shard whose row was lost
                if not unfinished:
                    return
                if attempt + 1 == ATTEMPTS:
                    raise
    return run


def _start(storage: Storage, trunk: Trunk, groups: Sequence[JobGroup], todo: Sequence[ShardPlace],
           workers: int, gpu: bool, threads: int) -> Iterator[dict[str, Any]]:
    """Yields a row as soon as its shard is finished."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows its own
    context.execution_options.verbose_progress = False
    items = [{"group": number, "shard": index} for number, index in todo]
    together = min(TOGETHER, max(1, len(todo) // (4 * workers)))
    rows: Any = ray.data.from_items(items, override_num_blocks=-(-len(todo) // together))
    written = rows.map_batches(Featuriser, batch_size=together,
                               concurrency=min(workers, len(todo)), num_gpus=1 if gpu else 0,
                               fn_constructor_args=(storage, trunk, groups,
                                                    "cuda" if gpu else "cpu", threads))
    with without_lines(HARMLESS):
        yield from written.iter_rows()


@contextlib.contextmanager
def without_lines(text: str) -> Iterator[None]:
    """Hides lines with `text` from stderr, also those that Ray's C++ code writes itself."""
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
