"""Frozen-trunk features in Arrow files: computed once, addressed by what determines them.

    <root>/features/<key>/part-00000-<sha256[:12]>.arrow   one record batch, uncompressed
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
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import torch
from torch import Tensor

from partialhn.cache import ShardCache, check_content, is_verified, mapped, mark_settled
from partialhn.errors import IntegrityError

FORMAT = 1
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
    """float16 or float32."""
    shard_rows: int
    """Rows of the table in one shard."""

    @property
    def key(self) -> str:
        """The name of the folder: 32 hexadecimal digits."""
        fields = json.dumps(dataclasses.asdict(self) | {"format": FORMAT}, sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One Arrow file of features: its name, its size and how to tell that it is whole."""

    name: str
    rows: int
    bytes: int
    sha256: str
    seconds: float
    """Time it took to decode, compute and write."""
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
        """Writes one shard and claims its place; where another writer was first, theirs counts."""
        content = _encode(recipe, z_NVCHW, y_N, ids)
        digest = hashlib.sha256(content).hexdigest()
        shard = Shard(f"part-{index:05d}-{digest[:12]}.arrow", len(ids), len(content), digest,
                      round(seconds, 3), tuple(bad))
        folder = self.folder(recipe.key)
        self._write(f"{folder}/{shard.name}", content)
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
        content = json.dumps(dataclasses.asdict(manifest), indent=1).encode()
        self._put_if_absent(f"{self.folder(recipe.key)}/manifest.json", content)
        found = self.find(recipe)
        if found is None:
            raise IntegrityError(f"the manifest of {recipe.key} was written and is not there")
        return found

    def open(self, manifest: Manifest) -> "FeatureSet":
        """Maps every shard into memory, each verified against the manifest.

        Raises: IntegrityError naming the shard, what was expected and what was found.
        """
        parts = [self._open_shard(manifest, shard) for shard in manifest.shards if shard.rows]
        if not parts:
            raise IntegrityError(f"the manifest of features {manifest.key} lists no rows")
        return FeatureSet(manifest, [part[0] for part in parts],
                          torch.from_numpy(np.concatenate([part[1] for part in parts])),
                          [name for part in parts for name in part[2]])

    def _open_shard(self, manifest: Manifest,
                    shard: Shard) -> tuple[Tensor, np.ndarray, list[str]]:
        content = self._content(manifest, shard)
        try:
            return _decode(content, manifest, shard)
        except (*_MALFORMED, pa.ArrowException, OSError, MemoryError) as error:
            raise IntegrityError(f"shard {shard.name} of {manifest.key} is not what its manifest "
                                 f"says: {error!r}") from error

    def _content(self, manifest: Manifest, shard: Shard) -> pa.Buffer:
        """The verified bytes of a shard, mapped: hashed once, and again when the file changed."""
        path = f"{self.folder(manifest.key)}/{shard.name}"
        missing = (f"shard {path} is missing; the manifest of {manifest.key} lists it with "
                   f"{shard.rows} rows")
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

    def _write(self, path: str, content: bytes) -> None:
        if self.local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(Path(path), content)
        else:
            with self.filesystem.open_output_stream(path) as sink:
                sink.write(content)


@dataclasses.dataclass
class FeatureSet:
    """One task's features of one split: N images with V views each."""

    manifest: Manifest
    shards: list[Tensor]
    """Memory-mapped (n, V, C, H, W) tensors."""
    y_N: Tensor
    """int64 labels."""
    ids: list[str]

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

    def to(self, device: torch.device) -> "FeatureSet":
        """One tensor on the device: read once, whatever the number of epochs."""
        whole = self.shards[0] if len(self.shards) == 1 else torch.cat(self.shards)
        return FeatureSet(self.manifest, [whole.to(device)], self.y_N.to(device), self.ids)

    def gather(self, rows_B: Tensor, views_B: Tensor) -> Tensor:
        """z_BCHW as float32: row rows_B[b] seen through view views_B[b]."""
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


def _write_atomically(path: Path, content: bytes) -> None:
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        raise


def _encode(recipe: FeatureRecipe, z_NVCHW: Tensor, y_N: np.ndarray, ids: Sequence[str]) -> bytes:
    values = z_NVCHW.to(getattr(torch, recipe.dtype)).cpu().contiguous().numpy()
    kind = pa.fixed_shape_tensor(pa.from_numpy_dtype(values.dtype), values.shape[1:])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)),
                                                int(np.prod(values.shape[1:])))
    schema = pa.schema([("id", pa.string()), ("label", pa.int64()), ("features", kind)],
                       metadata={"partialhn": json.dumps(dataclasses.asdict(recipe))})
    batch = pa.record_batch([pa.array(ids, pa.string()), pa.array(y_N, pa.int64()),
                             pa.ExtensionArray.from_storage(kind, storage)], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _decode(content: pa.Buffer, manifest: Manifest,
            shard: Shard) -> tuple[Tensor, np.ndarray, list[str]]:
    """Features, labels and ids of a shard; its offsets are checked before they are followed."""
    table = pa.ipc.open_file(content).read_all()
    table.validate(full=True)
    labels, dtype = table["label"], np.dtype(manifest.recipe.dtype)
    if (table["features"].num_chunks != 1 or labels.type != pa.int64() or labels.null_count
            or table["features"].type.value_type != pa.from_numpy_dtype(dtype)):
        raise ValueError(f"it holds {table.schema}")
    values = table["features"].chunk(0).storage.flatten()
    flat = np.frombuffer(values.buffers()[1], dtype=dtype, count=len(values),
                         offset=values.offset * dtype.itemsize)
    z_NVCHW = flat.reshape(shard.rows, *manifest.shape_VCHW)
    y_N, ids = labels.to_numpy(), table["id"].to_pylist()
    if len(y_N) != shard.rows or len(ids) != shard.rows:
        raise ValueError(f"it holds {len(y_N)} labels for {shard.rows} rows")
    return _as_tensor(z_NVCHW), y_N, ids


def _as_tensor(values: np.ndarray) -> Tensor:
    """A tensor over read-only mapped memory; it is only ever gathered from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


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
    except _MALFORMED as error:
        raise IntegrityError(f"the manifest of features {key} cannot be read: {error!r}") from error
    if manifest.key != key or manifest.recipe.key != key:
        raise IntegrityError(f"the manifest of features {key} describes {manifest.recipe.key}")
    return manifest
