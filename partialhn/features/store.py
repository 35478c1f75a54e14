"""The feature store: frozen-trunk features in Arrow files, under a key derived from their recipe.

    <root>/features/<key>/part-00000-<sha256[:12]>.arrow   one record batch (`codec.py`)
    <root>/features/<key>/part-00000.json                  names the file that counts as shard 0
    <root>/features/<key>/manifest.json                    written last; without it the set is
                                                           unfinished

A shard is named after its content, and its JSON record is created only if there is none yet. So
two writers of one key at worst do the work twice, and their files never mix. A writer that is
killed loses only the shard it was writing.

Legend: N images, V views, B batch, C channels, H W spatial.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import torch
from torch import Tensor

from partialhn.errors import IntegrityError
from partialhn.features.cache import ShardCache, check_content, is_verified, mark_settled
from partialhn.features.codec import Block, decode, encode, number_type, spilled
from partialhn.features.feature_set import FeatureSet, Scales
from partialhn.features.manifest import (
    MALFORMED,
    FeatureRecipe,
    Manifest,
    Shard,
    parse_manifest,
    parse_shard,
)
from partialhn.features.mapping import mapped, release_pages
from partialhn.folders import content_of

SPILL_BYTES = 1 << 30
"""A compressed set larger than this after decompression is kept in memory-mapped temporary files
($TMPDIR) instead of memory."""
PutIfAbsent = Callable[[str, bytes], bool]


class FeatureStore:
    """Reads and writes feature sets below one root on a pyarrow filesystem.

    `put_if_absent(path, content)` creates a small file unless it exists and returns whether it
    did; a local filesystem needs none. `cache` holds local copies of a remote filesystem's shards.
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
        """Folder of the features of a key."""
        return f"{self.root}/features/{key}"

    def find(self, recipe: FeatureRecipe) -> Manifest | None:
        """The manifest of a recipe's features, or None if they are not finished."""
        return self.manifest(recipe.key)

    def manifest(self, key: str) -> Manifest | None:
        """The manifest of a key, or None if its features are not finished.

        Raises: IntegrityError if it cannot be read or describes another key.
        """
        content = content_of(self.filesystem, f"{self.folder(key)}/manifest.json")
        return None if content is None else parse_manifest(content, key)

    def find_shard(self, key: str, index: int) -> Shard | None:
        """A shard that some writer has finished already, or None."""
        path = f"{self.folder(key)}/part-{index:05d}.json"
        content = content_of(self.filesystem, path)
        try:
            return None if content is None else parse_shard(json.loads(content))
        except MALFORMED as error:
            raise IntegrityError(f"{path} cannot be read as a shard's record: {error!r}"
                                 ) from error

    def write_shard(self, recipe: FeatureRecipe, index: int, z_NVCHW: Tensor, y_N: np.ndarray,
                    ids: Sequence[str], *, seconds: float,
                    bad: Sequence[tuple[str, str]] = ()) -> Shard:
        """Writes one shard and its record; if another writer was faster, returns that one's shard.

        seconds: time spent on the shard before writing.
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
        """Writes the manifest, after all shards; from then on the features count as finished."""
        manifest = Manifest(recipe.key, recipe, tuple(shards), tuple(shape_VCHW),
                            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                            {"torch": torch.__version__, "pyarrow": pa.__version__})
        fields = dataclasses.asdict(manifest) | {"recipe": recipe.fields()}
        content = json.dumps(fields, indent=1).encode()
        self._put_if_absent(f"{self.folder(recipe.key)}/manifest.json", content)
        stored = self.find(recipe)
        if stored is None:
            raise IntegrityError(f"the manifest of {recipe.key} was written but cannot be found")
        return stored

    def open(self, manifest: Manifest) -> "FeatureSet":
        """Maps every shard into memory, after verifying it against the manifest.

        Raises: IntegrityError naming the shard, and the size and SHA-256 found and expected;
            InputError for a number type of a package that is not here.
        """
        try:
            blocks = [self._open_shard(manifest, shard) for shard in manifest.shards if shard.rows]
        except IntegrityError as error:
            raise IntegrityError(f"{error}; to have these features computed again, delete "
                                 f"{self.folder(manifest.key)}") from error
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
        size = rows * math.prod(manifest.shape_VCHW) * number_type(recipe.dtype).tensor.itemsize
        try:
            block = decode(content, recipe.dtype, shard.rows, manifest.shape_VCHW)
            large = recipe.compression != "none" and size > SPILL_BYTES
            return spilled(block) if large else block
        except (*MALFORMED, pa.ArrowException, OSError, MemoryError) as error:
            raise IntegrityError(f"shard {shard.name} of {manifest.key} differs from its manifest: "
                                 f"{error!r}") from error

    def _content(self, manifest: Manifest, shard: Shard) -> pa.Buffer:
        """The verified bytes of a shard, memory-mapped; hashed once, and again after a change."""
        path = f"{self.folder(manifest.key)}/{shard.name}"
        missing = (f"shard {path} is missing; the manifest of {manifest.key} lists it with "
                   f"{shard.rows} rows (if the set was pruned meanwhile, the same command computes "
                   "it again)")
        try:
            if self.local:
                return _verified(Path(path), shard)
            if self._cache is None:
                raise ValueError("a remote feature store needs a cache to read through")
            return self._cache.fetch(manifest.key, shard.name, shard.bytes, shard.sha256,
                                     lambda: self.filesystem.open_input_stream(path))
        except FileNotFoundError as error:
            raise IntegrityError(missing) from error

    def _write(self, path: str, content: bytes | memoryview) -> None:
        if self.local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(Path(path), content)
        else:
            with self.filesystem.open_output_stream(path) as sink:
                sink.write(content)


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
        release_pages(content)
        with contextlib.suppress(OSError):  # a read-only folder: the file is hashed each time
            mark_settled(path)
    return content


def put_file_if_absent(path: str, content: bytes) -> bool:
    """Creates a local file with its whole content unless it exists; returns whether it did."""
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
