"""Computes feature shards with Ray Data: a pool of actors, each of which loads the trunk once, and
before it, where they have GPUs, a pool that decodes.

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

import numpy as np
import pyarrow as pa

from partialhn.data.decode import BadImage
from partialhn.errors import InputError
from partialhn.features.codec import as_tensor
from partialhn.features.jobs import JobGroup, ShardPlace, ShardResult
from partialhn.features.manifest import parse_shard
from partialhn.features.shards import DecodedShard, compute_shards, decode_shard
from partialhn.networks.precision import configure_torch
from partialhn.networks.trunk import Trunk
from pipelines.features.produce import Run, Say, open_store
from pipelines.platform.cluster import WorkerDevice, cluster_nodes
from pipelines.platform.storage import Storage

ATTEMPTS = 3
"""How often a pool of actors is started before the death of an actor is an error."""
TOGETHER = 8
"""Largest number of shards that an actor gets at once, so that it can read and write some while
another is in the trunk."""
DECODED_TOGETHER = 2
"""The same for shards that others have decoded: all of their pixels are in its memory."""
CPU = WorkerDevice()
"""No GPU for the actors with the trunk."""
HARMLESS = "has constructor arguments in the object store and max_restarts > 0"
"""Part of a warning at every start of an actor pool; harmless, because the arguments live as long
as the dataset."""


class Decoder:
    """The actor of the first operator where the trunk has a GPU: decodes whole shards on a CPU."""

    def __init__(self, storage: Storage, groups: Sequence[JobGroup]) -> None:
        configure_torch(1)
        self.store, self.groups = open_store(storage), groups

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for place in _places(batch):
            try:
                yield _pixels_row(place, decode_shard(self.store, self.groups[place[0]], place))
            except InputError as error:
                yield _pixels_row(place, None, str(error))


class Featuriser:
    """The actor with the trunk: computes and writes shards, and returns their records.

    It decodes their images itself, unless a `Decoder` did.
    """

    def __init__(self, storage: Storage, trunk: Trunk, groups: Sequence[JobGroup],
                 device: WorkerDevice, threads: int) -> None:
        configure_torch(threads)
        self.store = open_store(storage)
        self.trunk, self.groups, self.device = trunk, groups, device

    def __call__(self, batch: pa.Table) -> Iterator[dict[str, Any]]:
        places = _places(batch)
        errors = batch["error"].to_pylist() if "error" in batch.column_names else []
        said: list[str] = []
        """Lines for the user since the last row: what an actor prints stays in its log."""
        try:
            for error in filter(None, errors):
                raise InputError(error)
            self.trunk.to(self.device.here())
            for (group, index), shards, decoded in compute_shards(
                    self.store, self.trunk, self.groups, places, _pixels_of(batch, places),
                    said.append):
                written = json.dumps([dataclasses.asdict(shard) for shard in shards])
                yield _row(group, index, written, decoded, said=said)
                said.clear()
        except InputError as error:  # only the user can correct it, so Ray must not try again
            yield _row(*places[0], error=str(error), said=said)


def _places(batch: pa.Table) -> list[ShardPlace]:
    return list(zip(batch["group"].to_pylist(), batch["shard"].to_pylist(), strict=True))


def _pixels_row(place: ShardPlace, decoded: DecodedShard | None, error: str = "") -> pa.Table:
    """A decoded shard as a table of one row; its pixels are not copied again on their way."""
    values, facts = np.empty(0, np.uint8), "{}"
    if decoded is not None:
        values = decoded.images_NCHW.numpy().reshape(-1)
        facts = json.dumps({"shape": decoded.images_NCHW.shape, "kept": decoded.kept_N.tolist(),
                            "bad": [(bad.id, bad.reason) for bad in decoded.bad],
                            "seconds": decoded.seconds})
    ends = pa.py_buffer(np.array([0, len(values)], np.int64))
    pixels = pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(values)])
    return pa.table({"group": [place[0]], "shard": [place[1]], "facts": [facts], "error": [error],
                     "pixels": pixels})


def _pixels_of(batch: pa.Table, places: Sequence[ShardPlace]
               ) -> dict[ShardPlace, DecodedShard] | None:
    """The decoded shards of a batch; None where nobody decoded them."""
    if "pixels" not in batch.column_names:
        return None
    found = {}
    for place, cell, text in zip(places, batch["pixels"], batch["facts"].to_pylist(), strict=True):
        facts = json.loads(text)
        pixels_NCHW = np.frombuffer(cell.as_buffer() or b"", np.uint8).reshape(facts["shape"])
        found[place] = DecodedShard(as_tensor(pixels_NCHW), np.array(facts["kept"], np.int64),
                                    [BadImage(*bad) for bad in facts["bad"]], facts["seconds"])
    return found


def _row(group: int, shard: int, written: str = "", decoded: int = 0, *, error: str = "",
         said: Sequence[str] = ()) -> dict[str, Any]:
    """A batch of one row, as Ray Data expects it. said: lines for the user."""
    return {"group": [group], "shard": [shard], "written": [written], "decoded": [decoded],
            "error": [error], "said": [json.dumps(list(said))]}


def decoding_actors(device: WorkerDevice, workers: int) -> int:
    """Number of actors that decode on the cluster's CPUs for so many with the trunk on a GPU; a CPU
    for each of these is left. 0 where none is left: those with the trunk decode themselves.
    """
    if not device.gpus:
        return 0
    return max(0, int(sum(node.cpus for node in cluster_nodes())) - workers)


def on_ray(workers: int = 1, device: WorkerDevice = CPU, threads: int = 1,
           decoders: int = 0) -> Run:
    """A `Run` with that many actors; if one dies, its unfinished shards are computed again.

    decoders: actors on CPUs that decode for those with the trunk; Ray Data holds them back where
    the trunk is slower. 0: the actors with the trunk decode in threads.
    """
    def run(storage: Storage, trunk: Trunk, groups: Sequence[JobGroup],
            places: Sequence[ShardPlace], say: Say) -> Iterator[ShardResult]:
        from ray.exceptions import RayActorError

        unfinished = dict.fromkeys(places)
        for attempt in range(ATTEMPTS):
            try:
                for row in _start(storage, trunk, groups, tuple(unfinished), workers, device,
                                  threads, decoders):
                    for line in json.loads(row["said"]):
                        say(line)
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
           workers: int, device: WorkerDevice, threads: int,
           decoders: int) -> Iterator[dict[str, Any]]:
    """Yields a row as soon as its shard is finished."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the caller shows its own
    context.execution_options.verbose_progress = False
    items = [{"group": number, "shard": index} for number, index in todo]
    together = min(TOGETHER, max(1, len(todo) // (4 * workers)))
    if decoders:
        together = min(together, DECODED_TOGETHER)
    rows: Any = ray.data.from_items(items, override_num_blocks=-(-len(todo) // together))
    if decoders:
        rows = rows.map_batches(Decoder, batch_size=1, batch_format="pyarrow", num_cpus=1,
                                concurrency=min(decoders, len(todo)),
                                fn_constructor_args=(storage, groups))
    # without a CPU where it has a GPU: actors that decode may take all of that machine's
    written = rows.map_batches(Featuriser, batch_size=together, batch_format="pyarrow",
                               concurrency=min(workers, len(todo)), num_gpus=device.gpus,
                               num_cpus=0 if device.gpus else 1,
                               fn_constructor_args=(storage, trunk, groups, device, threads))
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
