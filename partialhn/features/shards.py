"""Computes the shards of features; the bytes do not depend on who computes them.

While some images of a shard go through the trunk, other threads read and decode the next ones, on
all cores, copy results from the trunk's device, and hash and write the shards before.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from partialhn.config import Augment
from partialhn.data.augment import Variation, draw, vary
from partialhn.data.decode import BadImage, decode_images
from partialhn.data.image_table import ImageTable
from partialhn.features.codec import number_type
from partialhn.features.jobs import FeatureJob, JobGroup, ShardPlace, ShardResult
from partialhn.features.link import Link, link_to
from partialhn.features.store import FeatureStore
from partialhn.networks.device_memory import explanation, is_out_of_memory, release
from partialhn.networks.trunk import Trunk, images_together, outputs_at
from partialhn.numbers import counted

READERS = max(4, os.cpu_count() or 1)
"""Threads that read and decode ahead of the trunk: all cores, and some more where files are far."""
PIECE = 64
"""Images that are decoded by a thread at a time."""
MOST_AHEAD, BYTES_AHEAD = 16, 128 * 1024 ** 2
"""Largest number of pieces that are decoded ahead of the trunk, and bytes of their pixels; one for
each reader at least."""
BEHIND, BEHIND_A_GPU, BYTES_BEHIND = 1, 8, 2 << 30
"""Largest number of shards that wait to be written while another goes through the trunk: on a CPU
one thread writes faster than the trunk computes, but a GPU computes faster than one thread
hashes. There they wait up to so many bytes."""
COPIES, COPIES_OF_A_GPU = 2, 8
"""Largest number of results of the trunk that wait to be copied to their shard."""
Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedShard:
    """The pixels of a shard's images, where another process decoded them."""

    images_NCHW: Tensor
    """uint8 images that could be read."""
    kept_N: np.ndarray
    """Row of each of them in the shard."""
    bad: list[BadImage]
    seconds: float
    """Processor seconds for reading and decoding."""


def compute_shards(store: FeatureStore, trunk: Trunk, groups: Sequence[JobGroup],
                   places: Iterable[ShardPlace],
                   pixels: Mapping[ShardPlace, DecodedShard] | None = None,
                   say: Callable[[str], None] = warnings.warn) -> Iterator[ShardResult]:
    """Yields the shards of the places, in order; computes those that no writer has finished.

    `trunk` must be at least as deep as the deepest job; only the caller's thread uses it. pixels:
    those of shards that are decoded already (`decode_shard`). Where the device has no memory for so
    many images at once, half as many are tried once; `say` gets a line about it.

    Raises: InputError naming an image that cannot be read, if on_bad_image is error;
    DeviceMemoryError where half as many are still too many.
    """
    device, whole = trunk.mean_C.device, images_together(trunk)
    left = dict.fromkeys(places)
    for together in (whole, max(1, whole // 2)):
        try:
            for result in _computed(store, trunk, groups, tuple(left), pixels or {}, together):
                left.pop(result[0], None)
                yield result
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            side = groups[0][0].recipe.input_size
            problem = explanation(
                error, f"features of {counted(together, 'image')} of {side} x {side} pixels at "
                f"once on device {device}", "a smaller input_size, or a device with more memory")
        if together < whole or whole == 1:
            raise problem
        release(device)
        say(f"{problem}; computing the rest with half as many images at once")


def _computed(store: FeatureStore, trunk: Trunk, groups: Sequence[JobGroup],
              places: Iterable[ShardPlace], given: Mapping[ShardPlace, DecodedShard],
              together: int) -> Iterator[ShardResult]:
    """`compute_shards` with so many images at once."""
    link = link_to(trunk.mean_C.device)
    behind, copies = _behind(groups, trunk)
    writing: collections.deque[concurrent.futures.Future[ShardResult]] = collections.deque()
    readers = concurrent.futures.ThreadPoolExecutor(READERS, "shard")
    writers = concurrent.futures.ThreadPoolExecutor(behind, "shard")
    copying = _Copying(copies)
    try:
        shards = ahead(readers,
                       lambda place: _Shard(store, groups[place[0]], place, given.get(place)),
                       places, READERS)
        pieces = ((shard, rows) for _, shard in shards for rows in shard.pieces())
        decoded = ahead(readers, lambda at: at[0].decode(at[1], link), pieces,
                        _pieces_ahead(groups))
        for shard, some in _batches(decoded, together):
            if some:
                shard.compute(trunk, some, together, link, copying)
            if shard.is_whole:
                if len(writing) == behind:
                    yield writing.popleft().result()
                writing.append(writers.submit(shard.write, store, link))
        while writing:
            yield writing.popleft().result()
    finally:  # shards that were computed are still written, whatever else went wrong
        readers.shutdown(cancel_futures=True)
        copying.shutdown()
        writers.shutdown()


def decode_shard(store: FeatureStore, jobs: JobGroup, place: ShardPlace,
                 threads: int = 1) -> DecodedShard:
    """Reads and decodes the images of a shard, for another process that computes it.

    There are none where some writer has finished the shards of all jobs. Raises: InputError naming
    an image that cannot be read, if on_bad_image is error.
    """
    shard = _Shard(store, jobs, place, None)
    with concurrent.futures.ThreadPoolExecutor(threads, "shard") as readers:
        rows = list(shard.pieces()) if shard.missing else []
        parts = [part for _, part in ahead(readers, shard.pixels, rows, 2 * threads)]
    side = jobs[0].recipe.input_size
    return DecodedShard(
        torch.cat([torch.empty(0, 3, side, side, dtype=torch.uint8),
                   *(part.images_NCHW for part in parts)]),
        np.concatenate([np.empty(0, np.int64), *(part.kept_N for part in parts)]),
        [bad for part in parts for bad in part.bad], shard.seconds)


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
    return max(READERS, min(MOST_AHEAD, BYTES_AHEAD // (PIECE * 3 * side * side)))


def _behind(groups: Sequence[JobGroup], trunk: Trunk) -> tuple[int, int]:
    """Number of shards that may wait to be written, and of results that may wait to be copied."""
    if trunk.mean_C.device.type == "cpu":
        return BEHIND, COPIES
    largest = max((sum(job.recipe.shard_rows * job.recipe.views * math.prod(job.shape_CHW)
                       * number_type(job.recipe.dtype).tensor.itemsize for job in group)
                   for group in groups), default=1)
    return max(BEHIND, min(BEHIND_A_GPU, BYTES_BEHIND // max(1, largest))), COPIES_OF_A_GPU


class _Copying:
    """Threads that copy results of the trunk into their shards, so many at most at a time."""

    def __init__(self, most: int) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(max(1, most // 2), "shard")
        self._most = most
        self._pending: collections.deque[concurrent.futures.Future[None]] = collections.deque()
        self.shutdown = self._pool.shutdown

    def submit(self, copy: Callable[[], None]) -> concurrent.futures.Future[None]:
        """Waits for the oldest copy if there are too many."""
        if len(self._pending) == self._most:
            self._pending.popleft().result()
        self._pending.append(self._pool.submit(copy))
        return self._pending[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class _Piece:
    """Some images of a shard on the way to the device."""

    rows: range
    """Rows of the shard, readable or not."""
    kept_N: np.ndarray
    """Rows of those that could be read."""
    bad: list[BadImage]
    views: list[Variation]
    """How the images vary in each view, on the host."""
    receive: Callable[[], list[Tensor]]
    """Gives the images, and after them the tensors of `views`, on the device."""


class _Shard:
    """One shard of a group of jobs on its way: it is decoded, computed and written in pieces.

    So neither the pixels of a shard nor its features as float32 are in memory as a whole, unless
    int8 needs them for its scales.
    """

    def __init__(self, store: FeatureStore, jobs: JobGroup, place: ShardPlace,
                 given: DecodedShard | None) -> None:
        self.jobs, self.place, self._given = jobs, place, given
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
        self.seconds = 0.0 if given is None else given.seconds
        """Processor seconds for reading and decoding (not wall time: the trunk runs meanwhile)."""
        self.is_whole = False
        """Whether all of its images have gone through the trunk."""
        self._features = {job.depth: _Features(self.missing, job.depth, len(self.table))
                          for job in self.missing}
        self._kept: list[int] = []
        self._bad: list[BadImage] = []
        self._copies: list[concurrent.futures.Future[None]] = []
        self._reading = threading.Lock()

    def pieces(self) -> Iterator[range]:
        """The rows of each piece; a single piece where nothing is missing."""
        step = PIECE if self.missing else len(self.table)
        for start in range(0, len(self.table), step):
            yield range(start, min(start + step, len(self.table)))

    def decode(self, rows: range, link: Link) -> _Piece | None:
        """A piece on its way to the device; None if no job is missing the shard."""
        if not self.missing:
            return None
        part, recipe = self.pixels(rows), self.missing[0].recipe
        views = [Variation() if not view or recipe.augment == "none" else
                 draw(self.first + part.kept_N, len(self.jobs[0].table), recipe.input_size, view,
                      cast(Augment, recipe.augment), recipe.seed) for view in range(recipe.views)]
        sent = link.send([part.images_NCHW,
                          *(tensor for variation in views for tensor in variation.tensors())])
        return _Piece(rows, part.kept_N, part.bad, views, sent)

    def pixels(self, rows: range) -> DecodedShard:
        """The images of some rows, read and decoded here unless they were before."""
        if self._given is not None:
            kept_N = self._given.kept_N
            first, last = np.searchsorted(kept_N, (rows.start, rows.stop))
            return DecodedShard(self._given.images_NCHW[first:last], kept_N[first:last],
                                self._given.bad if not rows.start else [], 0.0)
        job, start = self.missing[0], time.thread_time()
        part = self.table.take(rows)
        images = decode_images(self._encoded(rows, part), part.ids(), job.recipe.input_size,
                               job.recipe.transform, job.on_bad_image, job.max_image_pixels,
                               job.recipe.seed, job.recipe.pixels)
        seconds = time.thread_time() - start
        with self._reading:
            self.seconds += seconds
        return DecodedShard(images.images_BCHW, images.index_B.numpy() + rows.start, images.bad,
                            seconds)

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

    def compute(self, trunk: Trunk, pieces: Sequence[_Piece], together: int, link: Link,
                copying: _Copying) -> None:
        """Sends pieces through the trunk, so many images at a time; they come in order."""
        for piece in pieces:
            self._kept += piece.kept_N.tolist()
            self._bad += piece.bad
        received = [piece.receive() for piece in pieces if len(piece.kept_N)]
        if not received:
            return
        plain_BCHW, *rest = [torch.cat(parts) if len(received) > 1 else parts[0]
                             for parts in zip(*received, strict=True)]
        varied, deepest = iter(rest), max(self._features)
        for view, variation in enumerate(pieces[0].views):
            start = link.mark()
            images_BCHW = vary(plain_BCHW, variation.of(
                list(itertools.islice(varied, len(variation.tensors())))))
            for batch_BCHW in torch.split(images_BCHW, together):
                for depth, z_BCHW in outputs_at(trunk, self._features.keys(), batch_BCHW,
                                                together):
                    features = self._features[depth]
                    features.marks.append((start, link.mark()))
                    self._copies.append(copying.submit(link.fetch(
                        z_BCHW, features.target(view, len(z_BCHW)), stays=depth == deepest)))
                start = link.mark()

    def write(self, store: FeatureStore, link: Link) -> ShardResult:
        """Writes the missing shards, and forgets their features."""
        shards, ids, decoded = dict(self.finished), self.table.ids(), 0
        for copy in self._copies:
            copy.result()
        for depth in list(self._features):
            features = self._features.pop(depth)
            seconds = self.seconds + sum(link.seconds(*marks) for marks in features.marks)
            decoded = len(self.table)
            for job in self.missing:
                if job.depth == depth:
                    shards[job.recipe.key] = store.write_shard(
                        job.recipe, self.place[1], features.whole(),
                        self.table.label_N[self._kept], [ids[row] for row in self._kept],
                        seconds=seconds, bad=[(bad.id, bad.reason) for bad in self._bad])
        return self.place, [shards[job.recipe.key] for job in self.jobs], decoded


def _batches(decoded: Iterable[tuple[tuple[_Shard, range], _Piece | None]],
             together: int) -> Iterator[tuple[_Shard, list[_Piece]]]:
    """The pieces of each shard that go through the trunk together; none where all is finished."""
    some: list[_Piece] = []
    for (shard, rows), piece in decoded:
        some += [] if piece is None else [piece]
        shard.is_whole = rows.stop >= len(shard.table)
        if shard.is_whole or (len(some) + 1) * PIECE > together:
            yield shard, some
            some = []


class _Features:
    """The features of a shard at one depth, as its pieces come."""

    def __init__(self, jobs: Iterable[FeatureJob], depth: int, rows: int) -> None:
        """rows: images of the shard, readable or not."""
        ours = [job for job in jobs if job.depth == depth]
        kinds = {number_type(job.recipe.dtype) for job in ours}
        self.kind = (kinds.pop().tensor if len(kinds) == 1 and not any(
            kind.levels for kind in kinds) else torch.float32)
        """The stored number type, where no job needs another one or a scale over the shard."""
        self.marks: list[tuple[object, object]] = []
        """Where the device began and ended the work of each batch, its images included."""
        self._shape = (rows, ours[0].recipe.views, *ours[0].shape_CHW)
        self._z_NVCHW: Tensor | None = None
        """None until the first piece comes: shards are decoded ahead of the trunk."""
        self._used = [0] * ours[0].recipe.views

    def target(self, view: int, count: int) -> Tensor:
        """The place of the next images of a view."""
        if self._z_NVCHW is None:
            self._z_NVCHW = torch.empty(self._shape, dtype=self.kind)
        used = self._used[view]
        self._used[view] += count
        return self._z_NVCHW[used:used + count, view]

    def whole(self) -> Tensor:
        """z_NVCHW of all pieces."""
        if self._z_NVCHW is None:  # a shard without a row
            return torch.empty(0, *self._shape[1:], dtype=self.kind)
        return self._z_NVCHW[:self._used[0]]
