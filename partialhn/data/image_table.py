"""A table of encoded images by reference.

Nothing here decodes an image, and an image's bytes are read only when they are asked for, so a
table of a million images is a few arrays: it pickles small and travels between processes.

Shape suffix: N images of a table; n some of them.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs

from partialhn.data.columns import image_field
from partialhn.errors import InputError, IntegrityError

IntArray = npt.NDArray[np.integer[Any]]
READ_BYTES = 256_000_000
"""Bytes of encoded images that are read at a time from Parquet files."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTable:
    """N encoded, labelled images by reference."""

    filesystem: pyarrow.fs.FileSystem
    """Where the files are."""
    files: tuple[str, ...]
    """Paths in the filesystem."""
    file_N: IntArray
    """Which of the files holds the image."""
    row_N: IntArray
    """Row of the image in a Parquet file; -1: the file itself is the image."""
    label_N: IntArray
    """Class of the image, 0 to K-1 within its task; -1: not known."""
    column: str | None = None
    """The column of images in Parquet files; None: the one that `image_field` finds."""

    def __post_init__(self) -> None:
        for name, kind in (("file_N", np.int32), ("row_N", np.int64), ("label_N", np.int64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        assert self.file_N.shape == self.row_N.shape == self.label_N.shape == (len(self),)

    def __len__(self) -> int:
        return len(self.file_N)

    def take(self, index_n: IntArray | npt.NDArray[np.bool_] | Sequence[int]) -> "ImageTable":
        """The table of some images: positions, in the order given, or one boolean an image."""
        picked_n = np.arange(len(self))[np.asarray(index_n, dtype=None if len(index_n) else int)]
        used, file_n = np.unique(self.file_N[picked_n], return_inverse=True)
        return ImageTable(self.filesystem, tuple(self.files[i] for i in used), file_n,
                          self.row_N[picked_n], self.label_N[picked_n], self.column)

    @property
    def one_file_each(self) -> bool:
        """Whether every image is a file of its own, so that reading a few costs only those."""
        return bool((self.row_N < 0).all())

    def batches(self, size: int) -> Iterator[tuple[range, list[bytes]]]:
        """Encoded images in order, at most `size` at a time, with their positions.

        Of Parquet files about READ_BYTES are read at a time, so that a row group is seldom read
        twice.
        """
        step = size
        if not self.one_file_each:
            info = self.filesystem.get_file_info(list(self.files))
            share = READ_BYTES * len(self) / max(sum(file.size or 0 for file in info), 1)
            step = size * int(np.clip(share / size, 1, 256))
        for start in range(0, len(self), step):
            images = self.take(range(start, min(start + step, len(self)))).read()
            for first in range(0, len(images), size):
                part = images[first:first + size]
                yield range(start + first, start + first + len(part)), part

    def read(self) -> list[bytes]:
        """The encoded images, in the table's order. An absent (null) image is empty bytes.

        Each file and each Parquet row group is read once a call, so images that lie together
        are best read together.
        """
        images = [b""] * len(self)
        for position_n, chunk in self.chunks():
            for position, image in zip(position_n, chunk, strict=True):
                images[position] = image
        return images

    def ids(self) -> list[str]:
        """A name for each image that says where it is: the file, or file#row."""
        return [self.files[file] if row < 0 else f"{self.files[file]}#{row}"
                for file, row in zip(self.file_N.tolist(), self.row_N.tolist(), strict=True)]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the encoded images and labels in order, wherever they are stored.

        Reads every image the first time it is asked for.
        """
        return self._hashed[0]

    def image_hashes(self) -> npt.NDArray[np.uint64]:
        """The first 8 bytes of each image's SHA-256, read together with the fingerprint."""
        return self._hashed[1]

    @functools.cached_property
    def _hashed(self) -> tuple[str, npt.NDArray[np.uint64]]:
        digest_N = [b""] * len(self)
        for position_n, chunk in self.chunks():
            for position, image in zip(position_n, chunk, strict=True):
                digest_N[position] = hashlib.sha256(image).digest()
        whole = hashlib.sha256(b"".join(digest_N))
        whole.update(self.label_N.astype("<i8").tobytes())
        starts = b"".join(digest[:8] for digest in digest_N)
        return whole.hexdigest(), np.frombuffer(starts, np.uint64)

    def chunks(self) -> Iterator[tuple[IntArray, list[bytes]]]:
        """Positions and their encoded images, one file or one Parquet row group at a time."""
        if not len(self):
            return
        order_N = np.argsort(self.file_N, kind="stable")
        firsts = np.flatnonzero(np.diff(self.file_N[order_N])) + 1
        for position_n in np.split(order_N, firsts):
            path = self.files[self.file_N[position_n[0]]]
            if self.row_N[position_n[0]] < 0:
                with self.filesystem.open_input_file(path) as source:
                    image = source.read()
                yield position_n, [image] * len(position_n)
            else:
                for mine, images in _read_rows(self.filesystem, path, self.row_N[position_n],
                                               self.column):
                    yield position_n[mine], images


@contextlib.contextmanager
def sound(path: str, kind: str) -> Iterator[None]:
    """Whatever a damaged file makes of the library that reads it becomes one clear error.

    A file that is not there, a disk or a network in trouble stay what they are.

    Raises: InputError naming the file.
    """
    try:
        yield
    except (InputError, IntegrityError):
        raise
    except (OSError, pa.ArrowException, ValueError, TypeError, IndexError, OverflowError,
            MemoryError) as error:
        if isinstance(error, OSError) and (error.errno is not None or "AWS Error" in str(error)):
            raise
        raise InputError(f"{path} is no readable {kind} file: {error}") from error


def _read_rows(filesystem: Any, path: str, row_n: IntArray,
               column: str | None) -> Iterator[tuple[IntArray, list[bytes]]]:
    """Images of a Parquet file, a row group at a time, with their positions in `row_n`."""
    import pyarrow.parquet as pq  # here: decoding Parquet is not needed to hold a table

    with filesystem.open_input_file(path) as source, sound(path, "Parquet"):
        parquet = pq.ParquetFile(source)
        field = image_field(parquet.schema_arrow, path, column)
        packed = pa.types.is_struct(field.type)
        sizes = [parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)]
        ends = np.cumsum(sizes)
        group_n = np.searchsorted(ends, row_n, side="right")
        for group in np.unique(group_n).tolist():
            mine = np.flatnonzero(group_n == group)
            chunk = parquet.read_row_group(
                group, columns=[f"{field.name}.bytes" if packed else field.name]).column(0)
            values = chunk.take(pa.array(row_n[mine] - (ends[group] - sizes[group]))).to_pylist()
            yield mine, [((value or {}).get("bytes") if packed else value) or b""
                         for value in values]

