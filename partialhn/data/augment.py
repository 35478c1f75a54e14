"""Augmented views of images, as a function of seed, row and view: the same on every machine.

Augmentation cannot happen after the trunk's features are cached, so each training image is
cached in V views and one of them is drawn per epoch.

Legend: N rows of the table, B batch, C channels, H W spatial, S shift.
"""

import numpy as np
import torch
from torch import Tensor

from partialhn.config import Augment


def augment(images_BCHW: Tensor, rows_B: np.ndarray, rows_total: int, view: int, kind: Augment,
            seed: int) -> Tensor:
    """View number `view` of uint8 images: 0 is the plain image, others shift and flip it.

    rows_B: each image's row in its table of `rows_total` rows; what is drawn depends on seed,
    view and row alone. crop shifts by up to an eighth of the side, filling with black.
    """
    if view == 0 or kind == "none":
        return images_BCHW
    draws_B3 = _draws(rows_B, rows_total, view, seed)
    if "flip" in kind:
        flip_B = torch.from_numpy(draws_B3[:, 0] < 0.5).to(images_BCHW.device)
        images_BCHW = torch.where(flip_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)
    if "crop" in kind:
        images_BCHW = _shift(images_BCHW, draws_B3[:, 1:])
    return images_BCHW


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


def warp(images_BCHW: Tensor, rows_B: np.ndarray, rows_total: int, view: int,
         seed: int) -> Tensor:
    """uint8 images turned, scaled, sheared and shifted a little, each in its own way.

    What is drawn depends on seed, view and row alone. The border is continued outwards. It is for
    training on few images, which `augment` alone hardly varies.
    """
    draws_B6 = np.random.default_rng([seed, view, 1]).uniform(-1, 1, (rows_total, 6))[rows_B]
    turn_B, shear_B = TURN * draws_B6[:, 0], SHEAR * draws_B6[:, 1]
    scale_B2, shift_B2 = np.exp(SCALE * draws_B6[:, 2:4]), 2 * SHIFT * draws_B6[:, 4:]
    cos_B, sin_B = np.cos(turn_B), np.sin(turn_B)
    first_B3 = np.stack([cos_B * scale_B2[:, 0], (cos_B * shear_B - sin_B) * scale_B2[:, 1],
                         shift_B2[:, 0]], 1)
    second_B3 = np.stack([sin_B * scale_B2[:, 0], (sin_B * shear_B + cos_B) * scale_B2[:, 1],
                          shift_B2[:, 1]], 1)
    theta_B23 = torch.from_numpy(np.stack([first_B3, second_B3], 1)).float()
    grid_BHW2 = torch.nn.functional.affine_grid(theta_B23, list(images_BCHW.shape),
                                                align_corners=False)
    warped_BCHW = torch.nn.functional.grid_sample(
        images_BCHW.float(), grid_BHW2.to(images_BCHW.device), padding_mode="border",
        align_corners=False)
    return warped_BCHW.round().to(torch.uint8)


def _shift(images_BCHW: Tensor, draws_B2: np.ndarray) -> Tensor:
    B, C, H, W = images_BCHW.shape
    reach = max(1, H // 8)
    padded_BCHW = torch.nn.functional.pad(images_BCHW, [reach] * 4)
    shifts_B2 = torch.from_numpy((draws_B2 * (2 * reach + 1)).astype(np.int64))
    shifts_B2 = shifts_B2.to(images_BCHW.device)
    rows_BH = shifts_B2[:, :1] + torch.arange(H, device=images_BCHW.device)
    columns_BW = shifts_B2[:, 1:] + torch.arange(W, device=images_BCHW.device)
    batch_B = torch.arange(B, device=images_BCHW.device)[:, None, None, None]
    channel_C = torch.arange(C, device=images_BCHW.device)[None, :, None, None]
    return padded_BCHW[batch_B, channel_C, rows_BH[:, None, :, None], columns_BW[:, None, None, :]]
