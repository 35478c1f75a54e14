"""Frozen-trunk features in Arrow files: computed once, addressed by what determines them.

    <root>/features/<key>/part-00000-<sha256[:12]>.arrow   one record batch (`partialhn.codec`)
    <root>/features/<key>/part-00000.json                  which of them counts
    <root>/features/<key>/manifest.json                    written last; without it nothing is there

Shards are named by their content and claimed conditionally, so two writers of one key do the
work at most twice and never mix, and a writer that was killed loses the shard it was writing.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import torch
from torch import Tensor

from partialhn.cache import ShardCache, check_content, is_verified, mapped, mark_settled
from partialhn.codec import COMPRESSIONS, DTYPES, Block, decode, encode, spilled
from partialhn.errors import IntegrityError

FORMAT = 1
SPILL_BYTES = 1 << 30
"""A compressed set that is larger than this when read is kept in temporary files ($TMPDIR), which
are mapped, and not in memory."""
PutIfAbsent = Callable[[str, bytes], bool]
_SHARD_NAME = re.compile(r"part-\d{5,}-[0-9a-f]{12}\.arrow")
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError,
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
        text = json.dumps(self.fields() | {"format": FORMAT}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def fields(self) -> dict[str, Any]:
        """Plain values that make the recipe again. A compression of none is left out: features
        that were stored before there was any keep their key.
        """
        fields = dataclasses.asdict(self)
        if self.compression == "none":
            del fields["compression"]
        return fields


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


class FeatureStore:
    """Reads and writes feature sets below one root on a pyarrow filesystem.

    `put_if_absent(path, content)` creates a small file unless it exists and says whether it did;
    local paths need none. `cache` holds local copies of a remote filesystem's shards.
    """

    def __init__(self, filesystem: pafs.FileSystem, root: str,
                 put_if_absent: PutIfAbsent | None = None, cache: ShardCache | None = None) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")
        self.local = isinstance(filesystem, pafs.LocalFileSystem)
        if put_if_absent is None and not self.local:
            raise ValueError("a remote feature store needs put_if_absent")
        self._put_if_absent = put_if_absent or put_file_if_absent
        self._cache = cache

    def folder(self, key: str) -> str:
        """Where the features of a key lie."""
        return f"{self.root}/features/{key}"

    def find(self, recipe: FeatureRecipe) -> Manifest | None:
        """The finished features of a recipe, or None."""
        return self.manifest(recipe.key)

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of a key, or None where its features are not finished.

        Raises: IntegrityError where it cannot be read or describes another key.
        """
        content = self._read(f"{self.folder(key)}/manifest.json")
        return None if content is None else _parse_manifest(content, key)

    def find_shard(self, key: str, index: int) -> Shard | None:
        """A shard that some writer finished already, or None."""
        path = f"{self.folder(key)}/part-{index:05d}.json"
        content = self._read(path)
        try:
            return None if content is None else parse_shard(json.loads(content))
        except _MALFORMED as error:
            raise IntegrityError(f"{path} cannot be read as a shard's record: {error!r}"
                                 ) from error

    def write_shard(self, recipe: FeatureRecipe, index: int, z_NVCHW: Tensor, y_N: np.ndarray,
                    ids: Sequence[str], *, seconds: float,
                    bad: Sequence[tuple[str, str]] = ()) -> Shard:
        """Writes one shard and claims its place; where another writer was first, theirs counts.

        seconds: spent on it so far.
        """
        start = time.perf_counter()
        content = encode(z_NVCHW, y_N, ids, recipe.dtype, recipe.compression,
                         json.dumps(recipe.fields()))
        digest = hashlib.sha256(content).hexdigest()
        folder, name = self.folder(recipe.key), f"part-{index:05d}-{digest[:12]}.arrow"
        self._write(f"{folder}/{name}", content)
        shard = Shard(name, len(ids), len(content), digest,
                      round(seconds + time.perf_counter() - start, 3), tuple(bad))
        sidecar = f"{folder}/part-{index:05d}.json"
        if self._put_if_absent(sidecar, json.dumps(dataclasses.asdict(shard)).encode()):
            return shard
        winner = self.find_shard(recipe.key, index)
        if winner is None:
            raise IntegrityError(f"{sidecar} exists and cannot be read")
        return winner

    def commit(self, recipe: FeatureRecipe, shards: Sequence[Shard],
               shape_VCHW: Sequence[int]) -> Manifest:
        """Writes the manifest, last; from then on the features exist."""
        manifest = Manifest(recipe.key, recipe, tuple(shards), tuple(shape_VCHW),
                            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                            {"torch": torch.__version__, "pyarrow": pa.__version__})
        fields = dataclasses.asdict(manifest) | {"recipe": recipe.fields()}
        content = json.dumps(fields, indent=1).encode()
        self._put_if_absent(f"{self.folder(recipe.key)}/manifest.json", content)
        found = self.find(recipe)
        if found is None:
            raise IntegrityError(f"the manifest of {recipe.key} was written and is not there")
        return found

    def open(self, manifest: Manifest) -> "FeatureSet":
        """Maps every shard into memory, each verified against the manifest.

        Raises: IntegrityError naming the shard, what was expected and what was found.
        """
        blocks = [self._open_shard(manifest, shard) for shard in manifest.shards if shard.rows]
        if not blocks:
            raise IntegrityError(f"the manifest of features {manifest.key} lists no rows")
        return FeatureSet(manifest, [block.z_NVCHW for block in blocks],
                          torch.from_numpy(np.concatenate([block.y_N for block in blocks])),
                          [name for block in blocks for name in block.ids],
                          Scales.of([block.scale_C for block in blocks],
                                    [len(block.y_N) for block in blocks]))

    def _open_shard(self, manifest: Manifest, shard: Shard) -> Block:
        content = self._content(manifest, shard)
        recipe, rows = manifest.recipe, manifest.rows
        size = rows * math.prod(manifest.shape_VCHW) * DTYPES[recipe.dtype][0].itemsize
        try:
            block = decode(content, recipe.dtype, shard.rows, manifest.shape_VCHW)
            large = recipe.compression != "none" and size > SPILL_BYTES
            return spilled(block) if large else block
        except (*_MALFORMED, pa.ArrowException, OSError, MemoryError) as error:
            raise IntegrityError(f"shard {shard.name} of {manifest.key} is not what its manifest "
                                 f"says: {error!r}") from error

    def _content(self, manifest: Manifest, shard: Shard) -> pa.Buffer:
        """The verified bytes of a shard, mapped: hashed once, and again when the file changed."""
        path = f"{self.folder(manifest.key)}/{shard.name}"
        missing = (f"shard {path} is missing; the manifest of {manifest.key} lists it with "
                   f"{shard.rows} rows (a set that was pruned while it was opened is computed "
                   "again by the same command)")
        try:
            if self.local:
                return _verified(Path(path), shard)
            if self._cache is None:
                raise ValueError("a remote feature store needs a cache to read through")
            return self._cache.fetch(manifest.key, shard.name, shard.bytes, shard.sha256,
                                     lambda: self.filesystem.open_input_stream(path))
        except FileNotFoundError as error:
            raise IntegrityError(missing) from error

    def _read(self, path: str) -> bytes | None:
        try:
            with self.filesystem.open_input_file(path) as source:
                return bytes(source.readall())
        except FileNotFoundError:
            return None

    def _write(self, path: str, content: bytes | memoryview) -> None:
        if self.local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(Path(path), content)
        else:
            with self.filesystem.open_output_stream(path) as sink:
                sink.write(content)


@dataclasses.dataclass(frozen=True, eq=False)
class Scales:
    """What stored whole numbers are multiplied with: a scale for each channel of each shard."""

    scale_SC: Tensor
    shard_N: Tensor
    """The shard of each image."""

    @staticmethod
    def of(scales: Sequence[Tensor | None], rows: Sequence[int]) -> "Scales | None":
        """The scales of shards with so many rows; None where no shard has one."""
        there = [scale_C for scale_C in scales if scale_C is not None]
        if not there:
            return None
        ones_C = torch.ones_like(there[0])
        scale_SC = torch.stack([ones_C if scale_C is None else scale_C for scale_C in scales])
        return Scales(scale_SC, torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)))

    def to(self, device: torch.device) -> "Scales":
        return Scales(self.scale_SC.to(device), self.shard_N.to(device))

    def apply(self, z_BCHW: Tensor, rows_B: Tensor) -> Tensor:
        """The numbers that were stored, in place."""
        scale_BC = self.scale_SC[self.shard_N[rows_B]]
        return z_BCHW.mul_(scale_BC.view(*scale_BC.shape, *[1] * (z_BCHW.dim() - 2)))


@dataclasses.dataclass
class FeatureSet:
    """One task's features of one split: N images with V views each."""

    manifest: Manifest
    shards: list[Tensor]
    """(n, V, C, H, W) in the stored number type, memory-mapped where they are not compressed."""
    y_N: Tensor
    """int64 labels."""
    ids: list[str]
    scales: Scales | None = None
    """For int8."""

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return len(self.y_N)

    @property
    def views(self) -> int:
        """Views V of each image."""
        return self.manifest.shape_VCHW[0]

    @property
    def shape_CHW(self) -> tuple[int, ...]:
        """Shape of one image's features."""
        return self.manifest.shape_VCHW[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the features in memory."""
        return sum(shard.nbytes for shard in self.shards)

    def to(self, device: torch.device) -> "FeatureSet":
        """One tensor on the device: read once, whatever the number of epochs."""
        whole = self.shards[0] if len(self.shards) == 1 else torch.cat(self.shards)
        return FeatureSet(self.manifest, [whole.to(device)], self.y_N.to(device), self.ids,
                          self.scales and self.scales.to(device))

    def first_views(self, views: int) -> "FeatureSet":
        """The same images with the first views alone: they do not depend on how many there are."""
        if self.views == views:
            return self
        manifest = dataclasses.replace(self.manifest,
                                       shape_VCHW=(views, *self.manifest.shape_VCHW[1:]))
        return dataclasses.replace(self, manifest=manifest, shards=[
            shard[:, :views].contiguous() for shard in self.shards])

    def gather(self, rows_B: Tensor, views_B: Tensor) -> Tensor:
        """z_BCHW as float32: row rows_B[b] seen through view views_B[b]."""
        z_BCHW = self._stored(rows_B, views_B)
        return z_BCHW if self.scales is None else self.scales.apply(z_BCHW, rows_B)

    def _stored(self, rows_B: Tensor, views_B: Tensor) -> Tensor:
        if len(self.shards) == 1:
            flat = self.shards[0].flatten(0, 1)
            return flat.index_select(0, rows_B * self.views + views_B).float()
        z_BCHW = torch.empty(len(rows_B), *self.shape_CHW)
        shard_B = np.searchsorted(self._starts, rows_B.numpy(), side="right") - 1
        for index in np.unique(shard_B):
            here = torch.from_numpy(np.flatnonzero(shard_B == index))
            flat = self.shards[index].flatten(0, 1)
            local_B = rows_B[here] - int(self._starts[index])
            z_BCHW[here] = flat.index_select(0, local_B * self.views + views_B[here]).float()
        return z_BCHW


def join(sets: Sequence[FeatureSet]) -> FeatureSet | None:
    """Several feature sets of one shape as one; None of none."""
    if len(sets) < 2:
        return sets[0] if sets else None
    shards = [shard for each in sets for shard in each.shards]
    scales = [scale_C for each in sets for scale_C in
              (each.scales.scale_SC if each.scales else [None] * len(each.shards))]
    return FeatureSet(sets[0].manifest, shards, torch.cat([each.y_N for each in sets]),
                      [name for each in sets for name in each.ids],
                      Scales.of(scales, [len(shard) for shard in shards]))


def _verified(path: Path, shard: Shard) -> pa.Buffer:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != shard.bytes:
            check_content(str(path), size, hashlib.sha256(file.read()).hexdigest(), shard.bytes,
                          shard.sha256)
        content = mapped(file)
    if not is_verified(path):
        check_content(str(path), size, hashlib.sha256(memoryview(content)).hexdigest(),
                      shard.bytes, shard.sha256)
        with contextlib.suppress(OSError):  # a folder that cannot be written to: hashed each time
            mark_settled(path)
    return content


def put_file_if_absent(path: str, content: bytes) -> bool:
    """Creates a local file with its whole content unless it exists; says whether it did."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    draft.write_bytes(content)
    try:
        os.link(draft, target)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _write_atomically(path: Path, content: bytes | memoryview) -> None:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        raise


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


def _parse_manifest(content: bytes, key: str) -> Manifest:
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
    except _MALFORMED as error:
        raise IntegrityError(f"the manifest of features {key} cannot be read: {error!r}") from error
    if manifest.key != key or manifest.recipe.key != key:
        raise IntegrityError(f"the manifest of features {key} describes {manifest.recipe.key}")
    return manifest
