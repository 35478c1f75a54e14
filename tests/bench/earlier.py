"""The ways of commit 4084f75, in short: what the speed of today is compared with.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import collections
import concurrent.futures
import copy
import io
import math

import numpy as np
import torch
from PIL import Image

from partialhn.data.augment import augment
from partialhn.networks.backbone import pooled, to_map
from partialhn.training.image_batches import Labelled
from partialhn.training.optimiser import rate_factors
from partialhn.training.pretrain import TRUNK_LABEL_SMOOTHING

BATCH, AHEAD = 64, 4


def decoded(table, side: int) -> torch.Tensor:
    """Images, each of which was converted to RGB whatever it was."""
    pixels_BHWC = np.empty((len(table), side, side, 3), np.uint8)
    for place, encoded in enumerate(table.read()):
        with Image.open(io.BytesIO(encoded)) as image:
            image.draft(None, (math.ceil(2 * side),) * 2)
            rgb = image.convert("RGB")
        least = min(rgb.size)
        left, top = (rgb.width - least) / 2, (rgb.height - least) / 2
        pixels_BHWC[place] = np.asarray(rgb.resize(
            (side, side), Image.Resampling.BILINEAR, box=(left, top, left + least, top + least)))
    return torch.from_numpy(np.ascontiguousarray(pixels_BHWC.transpose(0, 3, 1, 2)))


def features(store, trunk, job) -> None:
    """All shards of a job: four threads read ahead, each batch is waited for, one thread writes."""
    trunk = copy.deepcopy(trunk).to(memory_format=torch.contiguous_format)
    device, recipe = trunk.mean_C.device, job.recipe
    readers, writer = (concurrent.futures.ThreadPoolExecutor(count) for count in (AHEAD, 1))
    starts = range(0, len(job.table), recipe.shard_rows)
    tables = [job.table.take(range(start, min(start + recipe.shard_rows, len(job.table))))
              for start in starts]
    reading = collections.deque(readers.submit(decoded, table, recipe.input_size)
                                for table in tables[:AHEAD])
    writing: collections.deque = collections.deque()
    for index, (start, table) in enumerate(zip(starts, tables, strict=True)):
        images_BCHW = reading.popleft().result()
        if index + AHEAD < len(tables):
            reading.append(readers.submit(decoded, tables[index + AHEAD], recipe.input_size))
        rows = start + np.arange(len(table))
        z_NVCHW = torch.empty(len(table), recipe.views, *job.shape_CHW)
        for view in range(recipe.views):
            seen_BCHW = augment(images_BCHW.to(device), rows, len(job.table), view, recipe.augment,
                                recipe.seed)
            for first in range(0, len(table), BATCH):
                chunk_BCHW = seen_BCHW[first:first + BATCH]
                z_NVCHW[first:first + BATCH, view] = through(trunk, chunk_BCHW)
        if writing:
            writing.popleft().result()
        writing.append(writer.submit(store.write_shard, recipe, index, z_NVCHW, table.label_N,
                                     table.ids(), seconds=0.0))
    writing.popleft().result()
    readers.shutdown()
    writer.shutdown()


@torch.no_grad()
def through(trunk, images_BCHW: torch.Tensor) -> torch.Tensor:
    """A batch through a trunk's blocks, channels first."""
    z_BCHW = trunk.normalise(images_BCHW)
    for stage in trunk.stages:
        z_BCHW = stage(z_BCHW)
    whole = len(trunk.stages) == len(trunk.names)
    return to_map(pooled(z_BCHW) if whole else z_BCHW, trunk.layout)


def trunk_pass(network, images: Labelled, batch: int, optimiser, number: int, rate: float,
               precision: str) -> None:
    """One pass of the trunk's training: every batch comes from the host, the body is divided and
    the draws of the whole pass are made in every step.
    """
    device, count = network.mean_C.device, len(images.y_N)
    order_N = np.random.default_rng([0, number]).permutation(count)
    factors = rate_factors("cosine", count // batch)
    network.train()
    for step in range(count // batch):
        for group in optimiser.param_groups:
            group["lr"] = rate * factors[step]
        rows_B = order_N[step * batch:(step + 1) * batch]
        images_BCHW = augment(images.images_NCHW[rows_B].to(device), rows_B, count, number,
                              "crop-flip", 0)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            logits_BK = network(images_BCHW).float()
        loss = torch.nn.functional.cross_entropy(logits_BK, images.y_N[rows_B].to(device),
                                                 label_smoothing=TRUNK_LABEL_SMOOTHING)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
