"""The labelled images of one split of a data set: of some Parquet files, or of a class folder tree.

Of Parquet files only the schema and the label column are read, of images nothing.

Shape suffix: N images of a split.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from partialhn.data.image_table import ImageTable, image_field, sound
from partialhn.errors import InputError

LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Names a Parquet column of labels may have, the first one found counts."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Files taken for images."""


@dataclasses.dataclass(frozen=True)
class LabelledSplit:
    """Images with the labels as found: whole numbers, or names."""

    images: ImageTable
    label_N: npt.NDArray[Any]
    names: tuple[str, ...] | None
    """Class names by label, where the data says them."""


def image_paths(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.lower().endswith(SUFFIXES)]


def parquet_paths(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.lower().endswith(".parquet")]


def split_top(listing: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The sub-folders with what is inside them, and the files of a listing's top level."""
    folders: dict[str, list[str]] = {}
    files = []
    for path in listing:
        top, slash, inside = path.partition("/")
        if not slash:
            files.append(top)
        else:
            folders.setdefault(top, [])
            folders[top] += [inside] if inside else []
    return folders, files


def folder_split(filesystem: Any, folder: str, inside: Sequence[str]) -> LabelledSplit:
    """`<class>/.../<image>`: the classes are the top folders in sorted order."""
    folders, files = split_top(inside)
    if image_paths(files):
        raise InputError(f"image {folder}/{image_paths(files)[0]} lies in no class folder; "
                         f"allowed: {folder}/<class>/<image>")
    images = [(name, path) for name in sorted(folders) for path in image_paths(folders[name])]
    if not images:
        raise InputError(f"no images found in {folder}; allowed: {folder}/<class>/<image>, with "
                         f"images ending in {' '.join(SUFFIXES)}, or Parquet files")
    table = file_table(filesystem, [f"{folder}/{name}/{path}" for name, path in images])
    return LabelledSplit(table, np.array([name for name, _ in images]), tuple(sorted(folders)))


def file_table(filesystem: Any, paths: Sequence[str]) -> ImageTable:
    """Image files, without labels."""
    unknown_N = np.full(len(paths), -1)
    return ImageTable(filesystem, tuple(paths), np.arange(len(paths)), unknown_N, unknown_N)


@contextlib.contextmanager
def _open_parquet(filesystem: Any, path: str) -> Iterator[Any]:
    with filesystem.open_input_file(path) as source, sound(path, "Parquet"):
        yield pq.ParquetFile(source)


def parquet_table(filesystem: Any, paths: Sequence[str]) -> ImageTable:
    """All images of some Parquet files, without labels."""
    rows = []
    for path in paths:
        with _open_parquet(filesystem, path) as parquet:
            image_field(parquet.schema_arrow, path)
            rows.append(parquet.metadata.num_rows)
    return _row_table(filesystem, paths, rows)


def _row_table(filesystem: Any, paths: Sequence[str], rows: Sequence[int]) -> ImageTable:
    row_N = np.concatenate([np.arange(count) for count in rows])
    file_N = np.repeat(np.arange(len(rows)), rows)
    return ImageTable(filesystem, tuple(paths), file_N, row_N, np.full(len(row_N), -1))


def parquet_split(filesystem: Any, paths: Sequence[str]) -> LabelledSplit:
    """All rows of some Parquet files; reads their schemas and label columns only."""
    columns, names = [], []
    for path in paths:
        with _open_parquet(filesystem, path) as parquet:
            schema = parquet.schema_arrow
            image_field(schema, path)
            column = next((name for name in LABEL_COLUMNS if name in schema.names), None)
            if column is None:
                raise InputError(f"{path} has columns {', '.join(schema.names)}; it needs a "
                                 f"column of labels named {' or '.join(LABEL_COLUMNS)}")
            columns.append(_labels(parquet.read(columns=[column]).column(0), path))
            names.append(_class_names(schema.metadata, column))
        if names[-1] != names[0] or columns[-1].dtype.kind != columns[0].dtype.kind:
            raise InputError(f"{path} names other classes than {paths[0]}; allowed: the same "
                             "class names in every file of a split")
    table = _row_table(filesystem, paths, [len(column) for column in columns])
    return LabelledSplit(table, np.concatenate(columns), names[0])


def _labels(column: Any, path: str) -> npt.NDArray[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    named = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    if not named and not pa.types.is_integer(column.type):
        raise InputError(f"labels of {path} have type {column.type}; allowed: whole numbers or "
                         "names")
    if column.null_count:
        raise InputError(f"{path} has {column.null_count} rows without a label; allowed: a label "
                         "in every row")
    if named:
        return np.array(column.to_pylist(), dtype=str)
    label_N: npt.NDArray[Any] = column.to_numpy().astype(np.int64)
    if len(label_N) and label_N.min() < 0:
        raise InputError(f"label of {path}#{int(label_N.argmin())} is {label_N.min()}; allowed: "
                         "0 or more")
    return label_N


def _class_names(metadata: Mapping[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Class names from the schema metadata that the Hugging Face libraries write."""
    written = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    names = written.get("info", {}).get("features", {}).get(column, {}).get("names")
    return None if names is None else tuple(map(str, names))
