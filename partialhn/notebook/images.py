"""Images in any form a notebook has them, as encoded images with names.

Legend: N images, H W height and width, C channels.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from partialhn.data.layout import open_images
from partialhn.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL import Image

    Picture = str | Path | bytes | Image.Image | npt.NDArray[np.uint8]
    Images = Picture | Iterable[Picture]
    """A path or folder, an encoded image, a PIL image, a uint8 array (H, W), (H, W, C) or
    (N, H, W, C) with 1, 3 or 4 channels, or several of these, also as a column of a data frame."""

BATCH = 256
"""Images that are decoded and labelled at once."""
FORMS = "a path, a folder, encoded bytes, a PIL image, a uint8 array, or a list of these"
SHAPES = "(H, W), (H, W, C) or (N, H, W, C) with C of 1, 3 or 4"


def batches(images: "Images") -> Iterator[tuple[list[bytes], list[str]]]:
    """Encoded images and their names, at most BATCH at a time.

    A file is named by its path, below the folder where one was given; anything else by its
    number. Raises: InputError for anything that is no image.
    """
    encoded: list[bytes] = []
    names: list[str] = []
    for number, (image, name) in enumerate(_each(images)):
        encoded.append(image)
        names.append(name or str(number))
        if len(encoded) == BATCH:
            yield encoded, names
            encoded, names = [], []
    if encoded:
        yield encoded, names


def _each(images: "Images") -> Iterator[tuple[bytes, str]]:
    """Every image with its name, which is empty where there is no path."""
    if isinstance(images, str | Path):
        yield from _below(str(images))
    elif isinstance(images, bytes | bytearray | memoryview):
        yield bytes(images), ""
    elif isinstance(images, np.ndarray) and images.dtype != object:
        yield from ((_png(pixels), "") for pixels in _pictures(images))
    elif hasattr(images, "save") and hasattr(images, "mode"):
        yield _encode(images), ""
    elif isinstance(images, Iterable) and not _is_table(images):
        for image in images:
            yield from _each(image)
    else:
        raise InputError(f"images is a {type(images).__name__}; allowed: {FORMS}")


def _is_table(images: object) -> bool:
    """Whether iterating gives names or parts of images: of a data frame, a dict, or a tensor."""
    return isinstance(images, Mapping) or getattr(images, "ndim", 1) != 1


def _below(path: str) -> Iterator[tuple[bytes, str]]:
    """The images of a file or folder, named by their paths below it."""
    table = open_images(path)
    root = Path(path).expanduser().absolute().as_posix().rstrip("/")
    base = root.rpartition("/")[0] if root in table.files else root
    for start in range(0, len(table), BATCH):
        part = table.take(np.arange(start, min(start + BATCH, len(table))))
        yield from zip(part.read(), (name.removeprefix(f"{base}/") for name in part.ids()),
                       strict=True)


def _pictures(array: "npt.NDArray[Any]") -> Sequence["npt.NDArray[np.uint8]"]:
    """The pictures of an array, one or a batch. Raises: InputError for another type or shape."""
    if array.dtype != np.uint8:
        raise InputError(f"images has dtype {array.dtype}; allowed: uint8 (0 to 255)")
    colours = array.ndim in (3, 4) and array.shape[-1] in (1, 3, 4)
    if not (array.ndim == 2 or colours):
        raise InputError(f"images has shape {array.shape}; allowed: {SHAPES}")
    return list(array) if array.ndim == 4 else [array]


def _png(pixels: "npt.NDArray[np.uint8]") -> bytes:
    """Encoded without loss, so that an array is answered as the same image in a file."""
    from PIL import Image

    if not pixels.size:
        raise InputError(f"images has shape {pixels.shape}; allowed: at least one pixel")
    grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    return _encode(Image.fromarray(np.ascontiguousarray(grey)))


def _encode(image: Any) -> bytes:
    buffer = io.BytesIO()
    if image.mode in ("I", "F"):  # as 32 bits, which are refused, and not as clipped 8 or 16
        image.save(buffer, "TIFF")
        return buffer.getvalue()
    try:
        image.save(buffer, "PNG")
    except OSError:  # a mode that PNG has not, such as CMYK
        image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
