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
from partialhn.data.listing import SUFFIXES, image_paths, is_image_content, kind_of, split_top
from partialhn.errors import InputError

LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Names a Parquet column of labels may have, the first one found counts."""


@dataclasses.dataclass(frozen=True)
class LabelledSplit:
    """Images with the labels as found: whole numbers, or names."""

    images: ImageTable
    label_N: npt.NDArray[Any]
    names: tuple[str, ...] | None
    """Class names by label, where the data says them."""
    paths: tuple[str, ...] = ()
    """The files that were used, relative to the split's folder; empty for Parquet files."""


def folder_split(filesystem: Any, folder: str, inside: Sequence[str]) -> LabelledSplit:
    """`<class>/.../<image>`: the classes are the top folders in sorted order.

    A file without a suffix is looked into. Raises: InputError for an image in no class folder, or
    where there is no image.
    """
    folders, files = split_top(inside)
    if image_paths(files):
        raise InputError(f"image {folder}/{image_paths(files)[0]} lies in no class folder; "
                         f"allowed: {folder}/<class>/<image>")
    images = [(name, path) for name in sorted(folders)
              for path in _images_in(filesystem, f"{folder}/{name}", folders[name])]
    if not images:
        raise InputError(f"no images found in {folder}; allowed: {folder}/<class>/<image>, with "
                         f"images ending in {' '.join(SUFFIXES)}, or Parquet files")
    paths = tuple(f"{name}/{path}" for name, path in images)
    table = file_table(filesystem, [f"{folder}/{path}" for path in paths])
    return LabelledSplit(table, np.array([name for name, _ in images]), tuple(sorted(folders)),
                         paths)


def _images_in(filesystem: Any, folder: str, inside: Sequence[str]) -> list[str]:
    """Images by name, and files without a suffix that begin as an image does."""
    return [path for path in inside if not path.endswith("/") and (
        image_paths([path]) or (kind_of(path) == "no suffix"
                                and _begins_as_image(filesystem, f"{folder}/{path}")))]


def _begins_as_image(filesystem: Any, path: str) -> bool:
    with filesystem.open_input_file(path) as source:
        return is_image_content(source.read(8))


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
            names.append(_class_names(schema.metadata, column, path))
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


def _class_names(metadata: Mapping[bytes, bytes] | None, column: str,
                 path: str) -> tuple[str, ...] | None:
    """Class names from the schema metadata that the Hugging Face libraries write, a list or a
    mapping of indices; None where it says none.

    Raises: InputError for names of another shape.
    """
    try:
        names: Any = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    except ValueError as error:
        raise InputError(f"the schema metadata 'huggingface' of {path} is not JSON: {error}"
                         ) from error
    for key in ("info", "features", column, "names"):
        names = names.get(key) if isinstance(names, dict) else None
    if isinstance(names, dict):
        indices = {str(number) for number in range(len(names))}
        if names.keys() != indices:
            raise InputError(f"class names of {path} are numbered {', '.join(sorted(names)[:5])}; "
                             f"allowed: 0 to {len(names) - 1}")
        names = [names[str(number)] for number in range(len(names))]
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise InputError(f"class names of {path} are {names!r:.100}; allowed: a list of names")
    return tuple(map(str, names))
