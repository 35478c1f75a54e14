"""The records of a stored feature set: what determines it, its shards, and its manifest."""

import dataclasses
import json
import re
from typing import Any

from partialhn.errors import IntegrityError
from partialhn.features.codec import COMPRESSIONS, DTYPES
from partialhn.naming import digest, named_values

FORMAT = 1
FIRST_FIELDS = frozenset(("trunk", "data", "transform", "input_size", "views", "augment", "seed",
                          "dtype", "shard_rows"))
"""Fields that every key is made from; a newer field only where it is not at its default."""
_SHARD_NAME = re.compile(r"part-\d{5,}-[0-9a-f]{12}\.arrow")
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
              RecursionError)
"""What Python raises on content that has another form than expected."""


@dataclasses.dataclass(frozen=True)
class FeatureRecipe:
    """All that determines a set of features; equal recipes are the same features."""

    trunk: str
    """Fingerprint of the trunk: architecture, depth and weights."""
    data: str
    """Fingerprint of the images and labels, in order."""
    transform: str
    """Named corruption of the task, or none."""
    input_size: int
    """Side of the images the trunk sees, in pixels."""
    views: int
    """Views V of each image."""
    augment: str
    """What the views beyond the first do; none for a single view."""
    seed: int
    """Seed of the views."""
    dtype: str
    """float32, float16, bfloat16 or int8."""
    shard_rows: int
    """Rows of the table in one shard."""
    compression: str = "none"
    """none or lz4."""

    @property
    def key(self) -> str:
        """The name of the folder: 32 hexadecimal digits."""
        return digest(self.fields() | {"format": FORMAT}, 32)

    def fields(self) -> dict[str, Any]:
        """Plain values that make the recipe again. A compression of none is left out: features
        that were stored before there was any keep their key.
        """
        return named_values(self, FIRST_FIELDS)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Arrow file of features: its name, its size and how to tell that it is whole."""

    name: str
    rows: int
    bytes: int
    sha256: str
    seconds: float
    """Time it takes to make it alone: decoding, the stages up to its depth, and writing. Where one
    pass makes several depths, what they share counts for each, and what is deeper does not."""
    bad: tuple[tuple[str, str], ...] = ()
    """Images left out: (id, reason)."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a finished set of features holds."""

    key: str
    recipe: FeatureRecipe
    shards: tuple[Shard, ...]
    shape_VCHW: tuple[int, ...]
    created: str
    libraries: dict[str, str]

    @property
    def rows(self) -> int:
        """Images in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def bad(self) -> list[tuple[str, str]]:
        """Images left out: (id, reason)."""
        return [entry for shard in self.shards for entry in shard.bad]


def parse_shard(fields: dict[str, Any]) -> Shard:
    """The shard that `dataclasses.asdict` and JSON made these fields of.

    Raises: KeyError, TypeError or ValueError for anything else, such as a name that leads away.
    """
    bad = tuple((str(name), str(reason)) for name, reason in fields["bad"])
    shard = Shard(**fields | {"bad": bad})
    if not isinstance(shard.name, str) or not _SHARD_NAME.fullmatch(shard.name):
        raise ValueError(f"name is {shard.name!r}")
    for key in ("rows", "bytes"):
        if type(getattr(shard, key)) is not int or getattr(shard, key) < 0:
            raise ValueError(f"{key} is {getattr(shard, key)!r}")
    return shard


def parse_manifest(content: bytes, key: str) -> Manifest:
    try:
        fields = json.loads(content)
        manifest = Manifest(fields["key"], FeatureRecipe(**fields["recipe"]),
                            tuple(parse_shard(shard) for shard in fields["shards"]),
                            tuple(fields["shape_VCHW"]), fields["created"], fields["libraries"])
        if not all(type(size) is int and size > 0 for size in manifest.shape_VCHW):
            raise ValueError(f"shape_VCHW is {fields['shape_VCHW']!r}")
        recipe = manifest.recipe
        if recipe.dtype not in DTYPES or recipe.compression not in COMPRESSIONS:
            raise ValueError(f"dtype is {recipe.dtype!r}, compression {recipe.compression!r}")
    except MALFORMED as error:
        raise IntegrityError(f"the manifest of features {key} cannot be read: {error!r}") from error
    if manifest.key != key or manifest.recipe.key != key:
        raise IntegrityError(f"the manifest of features {key} describes {manifest.recipe.key}")
    return manifest
