"""The image decoder: encoded images of any size and mode become the uint8 tensor the network sees.

Shape suffixes: B images, C = 3 channels, H W = size.
"""

import dataclasses
import io
import math
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from partialhn.data import corruptions
from partialhn.data.image_table import ImageTable
from partialhn.data.listing import POINTER
from partialhn.errors import InputError
from partialhn.pixels import Pixels

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Encodings that are decoded (PPM stands for PGM and PBM too); Pillow knows riskier ones."""


PLAIN = Pixels()
"""The whole central square of an image."""
MIN_16_BIT = 4096
"""Largest value that an image of 16 bits must reach, unless it is black: 16 of 256 grey levels."""
PIECE = 256
"""Images that `decode_to_file` decodes at a time."""
_FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
            "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}


@dataclasses.dataclass(frozen=True)
class BadImage:
    """An image that was left out, and why."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """Images as the network sees them."""

    images_BCHW: torch.Tensor
    """uint8, 3 channels."""
    index_B: torch.Tensor
    """int64: row of the table that each image comes from."""
    bad: list[BadImage]
    """Images that were left out."""


def decode(table: ImageTable, size: int, transform: str = "none",
           on_bad: Literal["error", "skip"] = "error", max_pixels: int = 50_000_000,
           seed: int = 0, pixels: Pixels = PLAIN) -> Decoded:
    """Reads and decodes a table's images; give it as many as fit in memory at once.

    Args:
        table: which images.
        size: side of the square result, in pixels.
        transform: corruptions to apply, from `partialhn.data.corruptions`.
        on_bad: raise at the first image that cannot be decoded, or leave it out and list it.
        max_pixels: larger images count as bad; found from the header, before decoding.
        seed: of random corruptions. They depend on the seed and the image's bytes alone.
        pixels: which part of an image becomes the square, and how it is resized.

    Raises: InputError naming the image.
    """
    return decode_images(table.read(), table.ids(), size, transform, on_bad, max_pixels, seed,
                         pixels)


def decode_to_file(table: ImageTable, size: int, transform: str = "none",
                   on_bad: Literal["error", "skip"] = "error", max_pixels: int = 50_000_000,
                   seed: int = 0, pixels: Pixels = PLAIN) -> Decoded:
    """The same for more images than fit in memory: their pixels lie in a temporary file, which is
    mapped into memory and vanishes with the tensor.

    Raises: InputError naming the image, or if the temporary folder has too little space.
    """
    shape, index, bad = (len(table), 3, size, size), [torch.empty(0, dtype=torch.int64)], []
    pixels_NCHW, ids, used = _temporary_array(shape), table.ids(), 0
    for rows, encoded in table.batches(PIECE):
        part = decode_images(encoded, ids[rows.start:rows.stop], size, transform, on_bad,
                             max_pixels, seed, pixels)
        pixels_NCHW[used:used + len(part.index_B)] = part.images_BCHW.numpy()
        used += len(part.index_B)
        index.append(part.index_B + rows.start)
        bad += part.bad
    return Decoded(torch.from_numpy(pixels_NCHW)[:used], torch.cat(index), bad)


def _temporary_array(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 values in a file that nobody else sees. Raises: InputError for too little space."""
    total = math.prod(shape)
    with tempfile.TemporaryFile() as file:
        try:
            # a mapped file must not run out of space later: that would end the process
            os.posix_fallocate(file.fileno(), 0, max(total, 1))
        except OSError as error:
            free = shutil.disk_usage(tempfile.gettempdir()).free / 1024 ** 3
            raise InputError(
                f"the images to train on take {total / 1024 ** 3:.1f} GiB once they are decoded, "
                f"but the temporary folder {tempfile.gettempdir()} cannot hold them "
                f"({error.strerror}; {free:.1f} GiB free); allowed: a folder with more space in "
                "TMPDIR, a smaller input_size, or fewer images_per_class") from error
        return np.memmap(file, np.uint8, "r+", shape=shape)


def decode_images(images: Sequence[bytes], ids: Sequence[str], size: int,
                  transform: str = "none", on_bad: Literal["error", "skip"] = "error",
                  max_pixels: int = 50_000_000, seed: int = 0,
                  pixels: Pixels = PLAIN) -> Decoded:
    """Decodes encoded images, as `decode` does; `ids` name them in messages.

    Any mode becomes RGB; transparency is dropped and orientation tags are not applied, as usual
    in this field. Of an animation the first frame counts.
    """
    names = corruptions.parse(transform)
    pixels_BHWC = np.empty((len(images), size, size, 3), dtype=np.uint8)
    index: list[int] = []
    bad: list[BadImage] = []
    with _WITHOUT_WARNINGS:  # odd metadata is no news
        for place, (encoded, image_id) in enumerate(zip(images, ids, strict=True)):
            try:
                image = _decode_one(encoded, size, max_pixels, pixels)
            except _BadImageError as error:
                if on_bad == "error":
                    raise InputError(f"image {image_id} {error}; mend it or take it away, or leave "
                                     "out such images with --on-bad-image skip (in a "
                                     "configuration: data.on_bad_image)") from error
                bad.append(BadImage(image_id, str(error)))
                continue
            pixels_BHWC[len(index)] = np.asarray(corruptions.corrupt(image, names, encoded, seed))
            index.append(place)
    pixels_BCHW = np.ascontiguousarray(pixels_BHWC[:len(index)].transpose(0, 3, 1, 2))
    return Decoded(torch.from_numpy(pixels_BCHW), torch.tensor(index, dtype=torch.int64), bad)


class _WithoutWarnings:
    """Silences warnings while any thread is in it.

    `warnings.catch_warnings` alone would leave them silenced where two threads leave in the order
    in which they came.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._outermost = warnings.catch_warnings(action="ignore")

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._outermost = warnings.catch_warnings(action="ignore")
                self._outermost.__enter__()
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._outermost.__exit__(None, None, None)


_WITHOUT_WARNINGS = _WithoutWarnings()


class _BadImageError(Exception):
    """Says what is wrong with an image, to follow its name."""


def _decode_one(encoded: bytes, size: int, max_pixels: int, pixels: Pixels) -> Image.Image:
    """RGB of size x size: a central square of the image, or all of it, resized with antialiasing.

    Raises: _BadImageError.
    """
    if not encoded:
        raise _BadImageError("is empty")
    if encoded.startswith(POINTER):
        raise _BadImageError("is a pointer of Git LFS and not the image; git lfs pull fetches it")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _BadImageError(
                    f"is too large: {width} x {height} = {width * height} pixels; allowed: up to "
                    f"{max_pixels} (max_image_pixels)")
            wanted = math.ceil(2 * size / pixels.crop)
            image.draft(None, (wanted, wanted))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
            rgb = _to_rgb(image)
    except _BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise _BadImageError(f"is no readable {', '.join(FORMATS)} image ({len(encoded)} bytes)"
                             ) from error
    except Image.DecompressionBombError as error:
        raise _BadImageError(f"is too large: {error} (max_image_pixels is {max_pixels})") from error
    except Exception as error:  # decoders raise anything on damaged bytes
        raise _BadImageError(f"is truncated or damaged: {error}") from error
    box = _box(rgb.width, rgb.height, pixels)
    whole = rgb.size == (size, size) and box == (0, 0, size, size)
    return rgb if whole else rgb.resize((size, size), _FILTERS[pixels.interpolation], box=box)


def _box(width: int, height: int, pixels: Pixels) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the part that becomes the square."""
    if pixels.squash:
        return 0, 0, width, height
    side = min(width, height) * pixels.crop
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    """Any 8- or 16-bit mode as RGB; transparency is dropped.

    Values of 10 or 12 bits in 16 are refused: divided by 256, hardly any grey levels are left.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        grey_HW = np.asarray(image)  # Pillow scales more than 8 bits of PGM to 16 and says "I"
        _check_16_bits(int(grey_HW.max()))
        return Image.fromarray((grey_HW >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _BadImageError(f"has 32-bit values (mode {image.mode}), whose range is not known; "
                             "allowed: 8 or 16 bits a channel")
    is_16_bit = any(";16" in str(tile[3]) for tile in image.tile)  # Pillow drops the lower 8 bits
    if image.mode == "RGB":
        image.load()  # convert would copy it
        rgb: Image.Image = image
    else:
        rgb = image.convert("RGB")
    if is_16_bit:
        largest = int(np.asarray(rgb).max())
        _check_16_bits(largest and 256 * largest + 255)
    return rgb


def _check_16_bits(largest: int) -> None:
    """Raises: _BadImageError for an image whose values do not fill their 16 bits."""
    if 0 < largest < MIN_16_BIT:
        raise _BadImageError(f"has 16 bits a value, but none above {largest}, so it would be "
                             "almost black; allowed: values that fill the 16 bits, or 8 bits")
