"""Data in: one reader for every form of input, and the decoder of its images.

`open_stream` gives the stream of experiences of a configuration: given tasks as they are, or a
class-incremental split of one data set. `decode` turns encoded images of any size and mode into
the uint8 tensor the network sees.

Shape suffixes: B images, C = 3 channels, H W = size.
"""

import dataclasses
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from partialhn import conversions, corruptions
from partialhn.config import DataConfig
from partialhn.errors import InputError
from partialhn.readers import ImageSet, read_sets
from partialhn.stream import (
    RESERVED,
    Experience,
    ImageTable,
    IntArray,
    held_out,
    split_classes,
    task_of,
)

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""Encodings that are decoded (PPM stands for PGM and PBM too); Pillow knows riskier ones."""


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


def open_stream(config: DataConfig, cache_dir: Path, filesystem: Any = None) -> list[Experience]:
    """The stream of experiences that a configuration describes; reads labels, but no images.

    A directory of tasks gives one experience a task, in natural order of their names (task-2
    before task-10). Everything else is one data set, cut by a class-incremental split into
    experiences named 0 to T-1. Where a data set has no test part, its validation part stands in,
    or else a share of every class is held out; a share of the training images is held out for
    validation. Both draws, and the split, depend on `stream_seed` alone.

    Args:
        config: what to open.
        cache_dir: local folder for data sets that come from a library.
        filesystem: pyarrow filesystem of `config.data`; default: local.

    Raises: InputError for data or options that cannot be used, naming them.
    """
    if config.stream_seed < 0:
        raise InputError(f"stream_seed is {config.stream_seed}; allowed: 0 or more")
    if config.data == "digits":
        sets = read_sets(str(conversions.convert_digits(cache_dir)), config.classes)
    elif config.data.startswith("torchvision:"):
        name = config.data.removeprefix("torchvision:")
        sets = read_sets(str(conversions.convert_torchvision(name, cache_dir)), config.classes)
    else:
        sets = read_sets(config.data, config.classes, filesystem)
    sets = (_with_held_out(sets, config) if isinstance(sets, ImageSet)
            else {name: _with_held_out(images, config) for name, images in sets.items()})
    if isinstance(sets, ImageSet):
        sets = _cut(sets, config) if config.stream == "classes" else _domains(sets, config)
    elif config.stream == "domains":
        raise InputError(f"stream is 'domains' but {config.data!r} is a directory of {len(sets)} "
                         "tasks; allowed: one data set, or the stream classes")
    elif config.task_sizes is not None or config.tasks not in (None, len(sets)):
        option = "task_sizes" if config.task_sizes is not None else "tasks"
        raise InputError(f"{option} is given but {config.data!r} is a directory of "
                         f"{len(sets)} tasks; allowed: leave {option} out")
    transforms = config.task_transforms or ("none",) * len(sets)
    if len(transforms) != len(sets):
        raise InputError(f"task_transforms has {len(transforms)} entries for {len(sets)} tasks; "
                         "allowed: one a task")
    for transform in transforms:
        corruptions.parse(transform)
    return [_experience(name, images, transform)
            for (name, images), transform in zip(sets.items(), transforms, strict=True)]


def given_experience(name: str, images: ImageSet, config: DataConfig, transform: str = "none",
                     classes: Sequence[str] | None = None) -> Experience:
    """One task that is a data set of its own; its missing parts are drawn as `open_stream` does.

    classes: number the labels by these classes, of which the data may show a few only.

    Raises: InputError for a class that is not among them, or data that cannot be used.
    """
    corruptions.parse(transform)
    images = _with_held_out(images, config)
    if classes is None:
        return _experience(name, images, transform)
    unknown = [label for label in images.classes if label not in classes]
    if unknown:
        raise InputError(f"class {unknown[0]!r} of {images.where} is not declared; allowed: "
                         + ", ".join(classes))
    new_K = np.array([list(classes).index(label) for label in images.classes])

    def numbered(table: ImageTable | None) -> ImageTable | None:
        return table and dataclasses.replace(table, label_N=new_K[table.label_N])

    train = numbered(images.train)
    assert train is not None
    return _experience(name, ImageSet(images.where, tuple(classes), train,
                                      numbered(images.validation), numbered(images.test)),
                       transform)


def _with_held_out(images: ImageSet, config: DataConfig) -> ImageSet:
    """All three parts; the missing ones are drawn from the training images."""
    if config.images_per_class is not None:
        images = _first_of_each_class(images, config.images_per_class)
    train, validation, test = images.train, images.validation, images.test
    if test is None:
        test, validation = validation, None
    if test is None:
        drawn_N = held_out(train.label_N, config.test, "test", images.classes, config.stream_seed)
        train, test = train.take(~drawn_N), train.take(drawn_N)
    if validation is None:
        drawn_N = held_out(train.label_N, config.validation, "validation", images.classes,
                           config.stream_seed)
        train, validation = train.take(~drawn_N), train.take(drawn_N)
    return ImageSet(images.where, images.classes, train, validation, test)


def _cut(images: ImageSet, config: DataConfig) -> dict[str, ImageSet]:
    """Class-incremental split of one data set into tasks named 0 to T-1."""
    parts = split_classes(len(images.classes), config.tasks, config.task_sizes,
                          config.stream_seed if config.class_order == "shuffled" else None)
    return {str(t): _subset(images, labels) for t, labels in enumerate(parts)}


def _domains(images: ImageSet, config: DataConfig) -> dict[str, ImageSet]:
    """Tasks 0 to T-1 of all classes: each class's images are dealt out among them, seeded."""
    if config.task_transforms is None:
        raise InputError("task_transforms is not given; allowed where the stream is 'domains': one "
                         "a task")
    count = len(config.task_transforms)
    if config.task_sizes is not None or config.tasks not in (None, count):
        raise InputError(f"stream is 'domains' with {count} task_transforms; allowed: no "
                         f"task_sizes, and tasks {count} or left out")

    def share(table: ImageTable | None, part: int, task: int) -> ImageTable | None:
        if table is None:
            return None
        order_N = np.random.default_rng([config.stream_seed, 3, part]).permutation(len(table))
        place_N = _place_in_class(table.label_N, order_N)
        return table.take(place_N % count == task)

    dealt = {}
    for task in range(count):
        train, validation, test = (share(table, part, task) for part, table in enumerate(
            (images.train, images.validation, images.test)))
        assert train is not None
        missing = set(range(len(images.classes))) - set(train.label_N.tolist())
        if missing:
            raise InputError(f"class {images.classes[min(missing)]!r} of {images.where} has too "
                             f"few images for {count} tasks; allowed: one a task at least")
        dealt[str(task)] = ImageSet(images.where, images.classes, train, validation, test)
    return dealt


def _first_of_each_class(images: ImageSet, count: int) -> ImageSet:
    """The first images of each class, in the order of the data."""
    def first(table: ImageTable | None) -> ImageTable | None:
        return table and table.take(_place_in_class(table.label_N, np.arange(len(table))) < count)

    train = first(images.train)
    assert train is not None
    return ImageSet(images.where, images.classes, train, images.validation, first(images.test))


def _place_in_class(label_N: IntArray, order_N: IntArray) -> IntArray:
    """How many images of its class come before each image, in an order of all."""
    sorted_N = order_N[np.argsort(label_N[order_N], kind="stable")]
    counts_K = np.bincount(label_N) if len(label_N) else np.zeros(0, int)
    place_N = np.empty(len(label_N), dtype=np.int64)
    place_N[sorted_N] = np.concatenate([np.arange(count) for count in counts_K] or [np.arange(0)])
    return place_N


def _subset(images: ImageSet, labels: Sequence[int]) -> ImageSet:
    """The images of some classes, which are numbered anew from 0."""
    new_K = np.full(len(images.classes), -1)
    new_K[list(labels)] = np.arange(len(labels))

    def of_classes(table: ImageTable | None) -> ImageTable | None:
        if table is None:
            return None
        label_N = new_K[table.label_N]
        return dataclasses.replace(table, label_N=label_N).take(label_N >= 0)

    train = of_classes(images.train)
    assert train is not None
    return ImageSet(images.where, tuple(images.classes[label] for label in labels), train,
                    of_classes(images.validation), of_classes(images.test))


def _experience(name: str, images: ImageSet, transform: str) -> Experience:
    assert images.validation is not None
    if task_of(name) in RESERVED:
        raise InputError(f"task is named {name!r}; allowed: any name but {', '.join(RESERVED)}, "
                         "which say that a task is to be inferred, or is none of those known")
    if not images.test:
        raise InputError(f"task {name!r} of {images.where} (classes {', '.join(images.classes)}) "
                         "has no test images; every task needs some")
    return Experience(name, images.classes, images.train, images.validation, images.test,
                      transform)


def decode(table: ImageTable, size: int, transform: str = "none",
           on_bad: Literal["error", "skip"] = "error", max_pixels: int = 50_000_000,
           seed: int = 0) -> Decoded:
    """Reads and decodes a table's images; give it as many as fit in memory at once.

    Args:
        table: which images.
        size: side of the square result, in pixels.
        transform: corruptions to apply, from `partialhn.corruptions`.
        on_bad: raise at the first image that cannot be decoded, or leave it out and list it.
        max_pixels: larger images count as bad; found from the header, before decoding.
        seed: of random corruptions. They depend on the seed and the image's bytes alone.

    Raises: InputError naming the image.
    """
    return decode_images(table.read(), table.ids(), size, transform, on_bad, max_pixels, seed)


def decode_images(images: Sequence[bytes], ids: Sequence[str], size: int,
                  transform: str = "none", on_bad: Literal["error", "skip"] = "error",
                  max_pixels: int = 50_000_000, seed: int = 0) -> Decoded:
    """Decodes encoded images, as `decode` does; `ids` name them in messages.

    Any mode becomes RGB; transparency is dropped and orientation tags are not applied, as usual
    in this field. Of an animation the first frame counts.
    """
    names = corruptions.parse(transform)
    pixels_BHWC = np.empty((len(images), size, size, 3), dtype=np.uint8)
    index: list[int] = []
    bad: list[BadImage] = []
    for place, (encoded, image_id) in enumerate(zip(images, ids, strict=True)):
        try:
            with warnings.catch_warnings(action="ignore"):  # odd metadata is no news
                image = _decode_one(encoded, size, max_pixels)
        except _BadImageError as error:
            if on_bad == "error":
                raise InputError(f"image {image_id} {error}; mend it or take it away, or leave "
                                 "out such images with on_bad_image skip") from error
            bad.append(BadImage(image_id, str(error)))
            continue
        pixels_BHWC[len(index)] = np.asarray(corruptions.corrupt(image, names, encoded, seed))
        index.append(place)
    pixels_BCHW = np.ascontiguousarray(pixels_BHWC[:len(index)].transpose(0, 3, 1, 2))
    return Decoded(torch.from_numpy(pixels_BCHW), torch.tensor(index, dtype=torch.int64), bad)


class _BadImageError(Exception):
    """Says what is wrong with an image, to follow its name."""


def _decode_one(encoded: bytes, size: int, max_pixels: int) -> Image.Image:
    """RGB of size x size: the central square of the image, resized with antialiasing.

    Raises: _BadImageError.
    """
    if not encoded:
        raise _BadImageError("is empty")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _BadImageError(
                    f"is too large: {width} x {height} = {width * height} pixels; allowed: up to "
                    f"{max_pixels} (max_image_pixels)")
            image.draft(None, (2 * size, 2 * size))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
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
    side = min(rgb.size)
    left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
    if rgb.size == (size, size):
        return rgb
    return rgb.resize((size, size), Image.Resampling.BILINEAR,
                      box=(left, top, left + side, top + side))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any 8- or 16-bit mode as RGB; transparency is dropped."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise _BadImageError(f"has 32-bit values (mode {image.mode}), whose range is not known; "
                             "allowed: 8 or 16 bits a channel")
    return image.convert("RGB")
