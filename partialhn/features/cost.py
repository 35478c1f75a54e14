"""The cost of stored features, estimated before any is computed: bytes, and epochs until they pay.

Storing features costs, once for each image: decoding it, sending V views through the trunk, and
writing the result. Each epoch then reads them. Without stored features, each epoch decodes the
image and sends one view through the trunk. Storing is cheaper after `once / (again - read)`
epochs. The seconds are measured on a few of the images, in this process; training itself costs
the same both ways and is not counted.

Legend: N images, V views, C channels, H W spatial.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from torch import Tensor

from partialhn.data.decode import decode
from partialhn.data.image_table import ImageTable
from partialhn.features import codec
from partialhn.features.jobs import FeatureJob
from partialhn.networks.trunk import Trunk, run_trunk_at

PROBED = 64
"""Largest number of images that the measurement uses."""


@dataclasses.dataclass(frozen=True)
class DepthPlan:
    """The cost of stored features at one freeze depth."""

    depth: int
    shape_CHW: tuple[int, ...]
    images: int
    """Number of images in all splits."""
    views: int
    """Views V of a training image."""
    bytes: int
    """Bytes of all features as they will be stored."""
    image_bytes: float
    """Bytes of the same images in their encoded files."""
    seconds: float
    """Seconds until all features of this depth alone are stored, by this process."""
    once: float
    """Seconds for a training image: decoding, V views through the trunk, writing."""
    again: float
    """Seconds for a training image and epoch without stored features: decoding, one view."""
    read: float
    """Seconds for a training image and epoch with stored features: reading."""

    @property
    def epochs(self) -> float:
        """Number of epochs after which storing features is cheaper; infinite means never."""
        return self.once / (self.again - self.read) if self.again > self.read else math.inf


def plan(jobs: Sequence[FeatureJob], trunk: Trunk) -> list[DepthPlan]:
    """A plan for every depth of the jobs; an empty list if no probed image can be read.

    `trunk` must be at least as deep as the deepest job; its weights do not matter.
    """
    by_depth: dict[int, list[FeatureJob]] = {}
    for job in jobs:
        by_depth.setdefault(job.depth, []).append(job)
    first = max(jobs, key=lambda job: job.recipe.views)
    table = first.table.take(np.linspace(0, len(first.table) - 1, PROBED).astype(int)
                             if len(first.table) > PROBED else np.arange(len(first.table)))
    start = time.perf_counter()
    images = decode(table, first.recipe.input_size, first.recipe.transform, "skip",
                    first.max_image_pixels, first.recipe.seed, first.recipe.pixels).images_BCHW
    decoding = (time.perf_counter() - start) / len(table)
    if not len(images):
        return []
    warm, _ = run_trunk_at(trunk, by_depth, images[:1])  # the first use in a process is slow
    _store(warm[max(by_depth)], first)
    z_NCHW, spent = run_trunk_at(trunk, by_depth, images)
    encoded = _encoded_bytes(table)
    plans = []
    for depth, ours in sorted(by_depth.items()):
        through = spent[depth] / len(images)
        size, write, read = _store(z_NCHW[depth], first)
        stored = sum(len(job.table) * job.recipe.views for job in ours)
        count = sum(len(job.table) for job in ours)
        plans.append(DepthPlan(depth, ours[0].shape_CHW, count, first.recipe.views,
                               round(size * stored), encoded * count,
                               decoding * count + (through + write) * stored,
                               decoding + first.recipe.views * (through + write),
                               decoding + through, read))
    return plans


def described(plans: Sequence[DepthPlan]) -> list[str]:
    """The plans as lines of a table, with a note on the measurement."""
    if not plans:
        return []
    rows = [("depth", "a view", "GiB", "times the images", "seconds", "cheaper after")]
    rows += [(str(row.depth), "x".join(map(str, row.shape_CHW)), f"{row.bytes / 2 ** 30:.3f}",
              f"{row.bytes / row.image_bytes:.1f}", f"{row.seconds:.0f}",
              f"{row.epochs:.1f} epochs" if math.isfinite(row.epochs) else "never")
             for row in plans]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
             for row in rows]
    views = f"{plans[0].views} view{'s' if plans[0].views > 1 else ''}"
    return [f"features of {plans[0].images} images, {views} of each to learn from:", *lines,
            "seconds: what one process needs to compute and store them; cheaper after: the epochs "
            "from which on",
            "storing costs less than running the trunk again in every epoch; measured here on at "
            f"most {PROBED} images"]


def _store(z_NCHW: Tensor, job: FeatureJob) -> tuple[float, float, float]:
    """Measures one view: bytes as stored, seconds to write it, seconds to read it."""
    ids, y_N = [str(row) for row in range(len(z_NCHW))], np.zeros(len(z_NCHW), np.int64)
    recipe = job.recipe
    start = time.perf_counter()
    content = codec.encode(z_NCHW[:, None], y_N, ids, recipe.dtype, recipe.compression,
                           json.dumps(recipe.fields()))
    write = time.perf_counter() - start
    start = time.perf_counter()
    block = codec.decode(pa.py_buffer(content), recipe.dtype, len(ids), (1, *z_NCHW.shape[1:]))
    block.z_NVCHW.float()
    read = time.perf_counter() - start
    raw = z_NCHW.numel() * codec.number_type(recipe.dtype).tensor.itemsize
    size = raw if recipe.compression == "none" else min(raw, len(content))
    return size / len(ids), write / len(ids), read / len(ids)


def _encoded_bytes(table: ImageTable) -> float:
    return sum(map(len, table.read())) / len(table)
