"""Batches of images for the training of a whole network, varied anew in every pass.

Orders and variations are drawn on the host, once an epoch, and selected on the device, so a step
runs the same operations on the same memory every time (`partialhn.training.steps`).

Legend: N images, E steps of an epoch, B batch, C channels, H W spatial, K classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from partialhn.config import Arithmetic, Augment
from partialhn.data.augment import Variation, draw, vary
from partialhn.features.batches import RESIDENT_BYTES, StepRows, prefetched
from partialhn.networks.backbone import Network
from partialhn.networks.device_memory import fits
from partialhn.networks.precision import arithmetic_of


class Labelled(NamedTuple):
    """Images with their labels: uint8 images_NCHW, int64 y_N."""

    images_NCHW: Tensor
    y_N: Tensor


class ImageBatches:
    """The batches of a training on images: `begin` starts an epoch, each call gives a batch.

    Args:
        images: all images, on the host.
        size: images in a batch; fewer images than that are one batch.
        kind: how images are augmented.
        seed: of all orders and variations.
        device: where the batches are used. The images are kept there if they fit; else a thread
            reads them on the host.
        passes: passes over the images in an epoch.
        warped: whether images are turned, scaled and sheared too.
    """

    def __init__(self, images: Labelled, size: int, kind: Augment, seed: int,
                 device: torch.device, *, passes: int = 1, warped: bool = False) -> None:
        self.batch = min(size, len(images.y_N))
        """Images in a batch."""
        self._steps_of_a_pass = len(images.y_N) // self.batch
        self.steps = self._steps_of_a_pass * passes
        """Batches of an epoch; images that do not fill a last one are left out of a pass."""
        self.resident = device.type == "cpu" or fits(images.images_NCHW.nbytes,
                                                     RESIDENT_BYTES, device)
        """Whether the images lie on the device."""
        self._images = Labelled(*(tensor.to(device) for tensor in images)) if (
            self.resident) else images
        self._kind, self._seed, self._device = kind, seed, device
        self._passes, self._warped = passes, warped
        self._rows, self._variation = StepRows(device), Variation()
        self.steps_1 = self._rows.steps_1 if self.resident else None
        """As in `Batches`."""
        self._read: Iterator[ImageBatch] = iter(())

    def begin(self, epoch: int) -> None:
        """Starts epoch number 1, 2, ...: the next batch is its first."""
        first = (epoch - 1) * self._passes
        passes = [self._pass(first + number + 1) for number in range(self._passes)]
        rows_EB, self._variation = passes[0]
        tensors = [rows_EB, *self._variation.tensors()]
        if self._passes > 1:
            tensors = [torch.cat(parts) for parts in zip(
                *([rows, *variation.tensors()] for rows, variation in passes), strict=True)]
        if self.resident:
            self._rows.begin(tensors)
        else:
            self._read = prefetched(
                (self._gathered(list(row)) for row in zip(*tensors, strict=True)), self._device)

    def __call__(self) -> "ImageBatch":
        return self._gathered(self._rows.next()) if self.resident else next(self._read)

    def _pass(self, number: int) -> tuple[Tensor, Variation]:
        """rows_EB of a pass, and how the images vary in it, with a first dimension E."""
        total, side = len(self._images.y_N), self._images.images_NCHW.shape[2]
        order_N = np.random.default_rng([self._seed, number]).permutation(total)
        order_N = order_N[:self._steps_of_a_pass * self.batch]
        variation = Variation() if self._kind == "none" else draw(
            order_N, total, side, number, self._kind, self._seed, warped=self._warped)
        by_step = (self._steps_of_a_pass, self.batch)
        return torch.from_numpy(order_N).view(by_step), variation.of(
            [tensor.view(*by_step, *tensor.shape[1:]) for tensor in variation.tensors()])

    def _gathered(self, row: list[Tensor]) -> "ImageBatch":
        rows_B, *varied = row
        images_NCHW, y_N = self._images
        return ImageBatch(images_NCHW.index_select(0, rows_B), y_N.index_select(0, rows_B),
                          *self._variation.of(varied))


class ImageBatch(NamedTuple):
    """uint8 images_BCHW, int64 y_B, and how the images are still to be varied (`Variation`)."""

    images_BCHW: Tensor
    y_B: Tensor
    flip_B: Tensor | None
    shift_B2: Tensor | None
    theta_B23: Tensor | None


class Classification(nn.Module):
    """The loss of a whole network on a batch of images.

    Args:
        network: the network; it stays on its device.
        arithmetic: arithmetic of its products.
        label_smoothing: as cross_entropy takes it.
    """

    def __init__(self, network: Network, arithmetic: Arithmetic, label_smoothing: float) -> None:
        super().__init__()
        self.network, self.arithmetic = network, arithmetic
        self.label_smoothing = label_smoothing
        self._blocks = list(network.blocks().values())  # once: a step must not divide the body

    def forward(self, images_BCHW: Tensor, y_B: Tensor,
                *variation: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The loss, and its terms: cross-entropy and number of correct answers, both detached.

        images_BCHW, y_B, variation: the fields of an `ImageBatch`.
        """
        images_BCHW = vary(images_BCHW, Variation(*variation))
        with arithmetic_of(self.arithmetic, images_BCHW.device):
            logits_BK = self.network.through(self._blocks, images_BCHW).float()
        loss = nn.functional.cross_entropy(logits_BK, y_B, label_smoothing=self.label_smoothing)
        return loss, (loss.detach(), (logits_BK.argmax(1) == y_B).sum(dtype=loss.dtype))
