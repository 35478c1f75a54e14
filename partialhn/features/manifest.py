"""The records of a stored feature set: its recipe, its shards, and its manifest."""

import dataclasses
import json
import re
from typing import Any, cast

from partialhn.errors import IntegrityError
from partialhn.naming import digest, named_values
from partialhn.pixels import Interpolation, Pixels

FORMAT = 1
FIRST_FIELDS = frozenset(("trunk", "data", "transform", "input_size", "views", "augment", "seed",
                          "dtype", "shard_rows"))
"""Fields that every key is made from; a newer field only where it is not at its default."""
_SHARD_NAME = re.compile(r"part-\d{5,}-[0-9a-f]{12}\.arrow")
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
              RecursionError)
"""Exceptions that Python raises on stored content of an unexpected form."""


@dataclasses.dataclass(frozen=True)
class FeatureRecipe:
    """Everything that determines a set of features; equal recipes give the same features."""

    trunk: str
    """Fingerprint of the trunk: architecture, depth and weights."""
    data: str
    """Fingerprint of the images and labels, in order."""
    transform: str
    """Name of the task's corruption, or none."""
    input_size: int
    """Side length of the trunk's input images, in pixels."""
    views: int
    """Views V of each image."""
    augment: str
    """Augmentation of the views after the first; none for a single view."""
    seed: int
    """Seed of the views."""
    dtype: str
    """float32, float16, bfloat16 or int8."""
    shard_rows: int
    """Images in one shard."""
    compression: str = "none"
    """none or lz4."""
    interpolation: str = "bilinear"
    """Filter that resizes an image to the trunk's input."""
    crop: float = 1.0
    """Share of an image's shorter side that the central square keeps."""
    squash: bool = False
    """Whether the whole image becomes the square. The mean and the spread of the pixels are part of
    the trunk's fingerprint."""

    @property
    def pixels(self) -> Pixels:
        """The way an image becomes the trunk's input."""
        return Pixels(interpolation=cast(Interpolation, self.interpolation), crop=self.crop,
                      squash=self.squash)

    @property
    def key(self) -> str:
        """Name of the set's folder: 32 hexadecimal digits, a hash of the recipe."""
        return digest(self.fields() | {"format": FORMAT}, 32)

    def fields(self) -> dict[str, Any]:
        """Plain values from which the recipe can be rebuilt.

        Fields that are newer than the first features are left out at their defaults, so that
        features stored before them keep their key.
        """
        return named_values(self, FIRST_FIELDS)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Arrow file of features: its name, its size and its checksum."""

    name: str
    rows: int
    bytes: int
    sha256: str
    seconds: float
    """Time to compute this shard alone: decoding, the network's stages up to its depth, writing.
    When several depths are computed together, shared work counts for each of them."""
    bad: tuple[tuple[str, str], ...] = ()
    """Images left out, as (id, reason)."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a finished set of features."""

    key: str
    recipe: FeatureRecipe
    shards: tuple[Shard, ...]
    shape_VCHW: tuple[int, ...]
    created: str
    libraries: dict[str, str]

    @property
    def rows(self) -> int:
        """Number of images in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Images left out, as (id, reason)."""
        return [entry for shard in self.shards for entry in shard.bad]


def parse_shard(fields: dict[str, Any]) -> Shard:
    """Rebuilds a shard from the fields that `dataclasses.asdict` and JSON gave.

    Raises: KeyError, TypeError or ValueError for anything else, such as a name with a path in it.
    """
    bad = tuple((str(name), str(reason)) for name, reason in fields["bad"])
    shard = Shard(**fields | {"bad": bad})
    if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
        raise ValueError(f"name is {shard.name!r}")
    if not isinstance(shard.sha256, str):
        raise ValueError(f"sha256 is {shard.sha256!r}")
    for key in ("rows", "bytes"):
        if type(getattr(shard, key)) is not int or getattr(shard, key) < 0:
            raise ValueError(f"{key} is {getattr(shard, key)!r}")
    return shard


def manifest_of(fields: dict[str, Any]) -> Manifest:
    """Rebuilds a manifest from the fields that `dataclasses.asdict` and JSON gave.

    Raises: KeyError, TypeError or ValueError for anything else.
    """
    return Manifest(fields["key"], FeatureRecipe(**fields["recipe"]),
                    tuple(parse_shard(shard) for shard in fields["shards"]),
                    tuple(fields["shape_VCHW"]), fields["created"], fields["libraries"])


def parse_manifest(content: bytes, key: str) -> Manifest:
    """Rebuilds a manifest from its file.

    Raises: IntegrityError if it is damaged or describes another key.
    """
    try:
        fields = json.loads(content)
        manifest = manifest_of(fields)
        if not all(type(size) is int and size > 0 for size in manifest.shape_VCHW):
            raise ValueError(f"shape_VCHW is {fields['shape_VCHW']!r}")
    except MALFORMED as error:
        raise IntegrityError(f"the manifest of features {key} cannot be read: {error!r}") from error
    if manifest.key != key or manifest.recipe.key != key:
        raise IntegrityError(f"the manifest of features {key} describes {manifest.recipe.key}")
    return manifest
