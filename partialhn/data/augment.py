"""Augmented views of images, as a function of seed, row and view: the same on every machine.

Augmentation cannot happen after the trunk's features are cached, so each training image is
cached in V views and one of them is drawn per epoch.

Legend: N rows of the table, B batch, C channels, H W spatial, S shift.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from partialhn.config import Augment


class Variation(NamedTuple):
    """How each image of a batch is varied; None where nothing of that kind is done.

    flip_B: whether it is mirrored. shift_B2: rows and columns to skip of the image with a black
    border of an eighth of its side. theta_B23: its affine map, as torch's affine_grid takes it.
    """

    flip_B: Tensor | None = None
    shift_B2: Tensor | None = None
    theta_B23: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Those that are not None."""
        return [tensor for tensor in self if tensor is not None]

    def of(self, tensors: Sequence[Tensor]) -> "Variation":
        """The same kinds of variation with other tensors, in the order of `tensors()`."""
        rest = iter(tensors)
        return Variation(*(None if tensor is None else next(rest) for tensor in self))


def augment(images_BCHW: Tensor, rows_B: np.ndarray, rows_total: int, view: int, kind: Augment,
            seed: int) -> Tensor:
    """View number `view` of uint8 images: 0 is the plain image, others shift and flip it.

    rows_B: each image's row in its table of `rows_total` rows; what is drawn depends on seed,
    view and row alone. crop shifts by up to an eighth of the side, filling with black.
    """
    if view == 0 or kind == "none":
        return images_BCHW
    return vary(images_BCHW, draw(rows_B, rows_total, images_BCHW.shape[2], view, kind, seed))


def draw(rows_B: np.ndarray, rows_total: int, side: int, view: int, kind: Augment, seed: int, *,
         warped: bool = False) -> Variation:
    """What `augment` does to images of `side` pixels, on the host; and `warp` too, if warped."""
    draws_B3 = _draws(rows_B, rows_total, view, seed)
    spread = 2 * _reach(side) + 1
    return Variation(
        torch.from_numpy(draws_B3[:, 0] < 0.5) if "flip" in kind else None,
        torch.from_numpy((draws_B3[:, 1:] * spread).astype(np.int64)) if "crop" in kind else None,
        _affine_maps(rows_B, rows_total, view, seed) if warped else None)


def vary(images_BCHW: Tensor, variation: Variation) -> Tensor:
    """uint8 images flipped, shifted and warped, on the device on which they lie."""
    device = images_BCHW.device
    flip_B, shift_B2, theta_B23 = (None if tensor is None else tensor.to(device)
                                   for tensor in variation)
    if flip_B is not None:
        images_BCHW = torch.where(flip_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)
    if shift_B2 is not None:
        images_BCHW = _shift(images_BCHW, shift_B2)
    return images_BCHW if theta_B23 is None else _warp(images_BCHW, theta_B23)


def _draws(rows_B: np.ndarray, rows_total: int, view: int, seed: int) -> np.ndarray:
    """Three numbers from 0 to 1 for each row: those of a table with `rows_total` rows of three,
    of which only the part that holds the rows is drawn.
    """
    if not len(rows_B):
        return np.empty((0, 3))
    first, last = int(rows_B.min()), int(rows_B.max())
    assert last < rows_total
    bits = np.random.PCG64(np.random.SeedSequence([seed, view]))
    bits.advance(3 * first)
    drawn_n3 = np.random.Generator(bits).random((last - first + 1, 3))
    return np.asarray(drawn_n3[rows_B - first])


TURN, SCALE, SHEAR, SHIFT = 0.25, 0.15, 0.15, 0.1
"""Largest turn in radians, logarithm of a scale, shear, and shift as a share of the side."""


def _affine_maps(rows_B: np.ndarray, rows_total: int, view: int, seed: int) -> Tensor:
    """theta_B23 of maps that turn, scale, shear and shift a little, each in its own way.

    What is drawn depends on seed, view and row alone. This is for training on few images, which
    `augment` alone hardly varies.
    """
    draws_B6 = np.random.default_rng([seed, view, 1]).uniform(-1, 1, (rows_total, 6))[rows_B]
    turn_B, shear_B = TURN * draws_B6[:, 0], SHEAR * draws_B6[:, 1]
    scale_B2, shift_B2 = np.exp(SCALE * draws_B6[:, 2:4]), 2 * SHIFT * draws_B6[:, 4:]
    cos_B, sin_B = np.cos(turn_B), np.sin(turn_B)
    first_B3 = np.stack([cos_B * scale_B2[:, 0], (cos_B * shear_B - sin_B) * scale_B2[:, 1],
                         shift_B2[:, 0]], 1)
    second_B3 = np.stack([sin_B * scale_B2[:, 0], (sin_B * shear_B + cos_B) * scale_B2[:, 1],
                          shift_B2[:, 1]], 1)
    return torch.from_numpy(np.stack([first_B3, second_B3], 1)).float()


def _warp(images_BCHW: Tensor, theta_B23: Tensor) -> Tensor:
    """The images under their affine maps; the border is continued outwards."""
    grid_BHW2 = torch.nn.functional.affine_grid(theta_B23, list(images_BCHW.shape),
                                                align_corners=False)
    warped_BCHW = torch.nn.functional.grid_sample(images_BCHW.float(), grid_BHW2,
                                                  padding_mode="border", align_corners=False)
    return warped_BCHW.round().to(torch.uint8)


def _reach(side: int) -> int:
    """Largest shift, in pixels."""
    return max(1, side // 8)


def _shift(images_BCHW: Tensor, shift_B2: Tensor) -> Tensor:
    B, C, H, W = images_BCHW.shape
    padded_BCHW = torch.nn.functional.pad(images_BCHW, [_reach(H)] * 4)
    rows_BH = shift_B2[:, :1] + torch.arange(H, device=images_BCHW.device)
    columns_BW = shift_B2[:, 1:] + torch.arange(W, device=images_BCHW.device)
    batch_B = torch.arange(B, device=images_BCHW.device)[:, None, None, None]
    channel_C = torch.arange(C, device=images_BCHW.device)[None, :, None, None]
    return padded_BCHW[batch_B, channel_C, rows_BH[:, None, :, None], columns_BW[:, None, None, :]]
