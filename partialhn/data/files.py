"""The labelled images of one split of a data set: of some Parquet files, or of image files.

Of Parquet files only the schema and the label column are read, of images nothing.

Shape suffix: N images of a split.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from partialhn.data.columns import (
    ANY,
    SPLIT_COLUMN,
    Columns,
    class_names,
    features_of,
    image_field,
    label_field,
    split_notes,
)
from partialhn.data.image_table import ImageTable, sound
from partialhn.data.listing import (
    COMMON_WORDS,
    POINTER,
    SUFFIXES,
    image_paths,
    is_image_content,
    kind_of,
    split_of_folder,
    split_top,
)
from partialhn.data.metadata import Labels
from partialhn.errors import InputError


@dataclasses.dataclass(frozen=True)
class LabelledSplit:
    """Images with the labels as found: whole numbers, or names."""

    images: ImageTable
    label_N: npt.NDArray[Any]
    names: tuple[str, ...] | None
    """Class names by label, where the data says them."""
    paths: tuple[str, ...] = ()
    """The files that were used, relative to the split's folder; empty for Parquet files."""
    column: str = ""
    """The column of labels; empty where folders are the labels."""
    notes: tuple[str, ...] = ()
    """How the labels were found, where a user may expect another way."""
    unlabelled: tuple[str, ...] = ()
    """Images that a table beside them has no row for; a note says so."""


def folder_split(filesystem: Any, folder: str, inside: Sequence[str]) -> LabelledSplit:
    """`<class>/.../<image>`: the classes are the top folders in sorted order.

    A file without a suffix is looked into. Raises: InputError for an image in no class folder,
    where there is no image, or where it is not clear which folders are the classes.
    """
    folders, files = split_top(inside)
    if image_paths(files):
        raise InputError(f"image {folder}/{image_paths(files)[0]} lies in no class folder; "
                         f"allowed: {folder}/<class>/<image>, or a table metadata.csv beside the "
                         "images with the columns file_name and label")
    images = [(name, path) for name in sorted(folders)
              for path in images_in(filesystem, f"{folder}/{name}", folders[name])]
    if not images:
        raise InputError(f"no images found in {folder}; allowed: {folder}/<class>/<image>, with "
                         f"images ending in {' '.join(SUFFIXES)}, or Parquet files")
    paths = tuple(f"{name}/{path}" for name, path in images)
    below = _folders_below(folder, images)
    if len(folders) == 1 and below:
        name = next(iter(folders))
        if set(name.lower().replace("-", "_").split("_")) <= set(COMMON_WORDS):
            inner = folder_split(filesystem, f"{folder}/{name}", folders[name])
            return dataclasses.replace(inner, paths=tuple(f"{name}/{path}" for path in inner.paths))
        raise InputError(f"{folder} holds one folder, {name}/, and its images lie in the folders "
                         f"{', '.join(below[name][:5])} below it, so it is not clear which are the "
                         f"classes; allowed: {folder}/<class>/<image>")
    table = file_table(filesystem, [f"{folder}/{path}" for path in paths])
    notes = tuple(f"the images of {name}/ lie in its folders {', '.join(inner[:5])}; all of them "
                  f"are of the class {name}" for name, inner in list(below.items())[:5])
    return LabelledSplit(table, np.array([name for name, _ in images]), tuple(sorted(folders)),
                         paths, notes=notes)


def _folders_below(folder: str, images: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Class folders whose images lie in two or more folders of their own, with those folders.

    Raises: InputError for a folder below a class that is named like a split.
    """
    below: dict[str, set[str]] = {}
    for name, path in images:
        steps = path.split("/")[:-1]
        split = next((step for step in steps if split_of_folder(step)), None)
        if split is not None:
            raise InputError(f"{folder}/{name} has the folder {split}/ below it, which is named "
                             f"like a split, so it would be mixed into the class {name}; allowed: "
                             "train/<class>/<image> and test/<class>/<image>, or another name")
        below.setdefault(name, set()).update(steps[:1])
    return {name: sorted(inner) for name, inner in below.items() if len(inner) > 1}


def table_split(filesystem: Any, root: str, paths: Sequence[str], labels: Labels) -> LabelledSplit:
    """Image files whose labels a table beside them gives.

    paths: relative to the root, as in the labels; those without a label are left out.
    """
    labelled = sorted(path for path in paths if path in labels.by_path)
    table = file_table(filesystem, [f"{root}/{path}" for path in labelled])
    label_N = np.array([labels.by_path[path] for path in labelled])
    return LabelledSplit(table, label_N, labels.names, tuple(labelled), labels.column)


def images_in(filesystem: Any, folder: str, inside: Sequence[str]) -> list[str]:
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
    with filesystem.open_input_file(path) as source:
        if source.size() < 1024 and source.read(len(POINTER)) == POINTER:
            raise InputError(f"{path} is a pointer of Git LFS and not the data itself; fetch it "
                             "with git lfs pull")
        source.seek(0)
        with sound(path, "Parquet"):
            yield pq.ParquetFile(source)


def parquet_table(filesystem: Any, paths: Sequence[str], column: str | None = None) -> ImageTable:
    """All images of some Parquet files, without labels. column: of images; None: by its name."""
    rows = []
    for path in paths:
        with _open_parquet(filesystem, path) as parquet:
            image_field(parquet.schema_arrow, path, column)
            rows.append(parquet.metadata.num_rows)
    return _row_table(filesystem, paths, rows, column)


def _row_table(filesystem: Any, paths: Sequence[str], rows: Sequence[int],
               column: str | None) -> ImageTable:
    row_N = np.concatenate([np.arange(count) for count in rows])
    file_N = np.repeat(np.arange(len(rows)), rows)
    return ImageTable(filesystem, tuple(paths), file_N, row_N, np.full(len(row_N), -1), column)


def parquet_split(filesystem: Any, paths: Sequence[str], columns: Columns = ANY,
                  described: Mapping[str, tuple[str, ...]] | None = None) -> LabelledSplit:
    """All rows of some Parquet files; reads their schemas and label columns only.

    described: class names by column, for files whose own metadata has none.
    """
    labels, names, used, notes = [], [], [], list[str]()
    for path in paths:
        with _open_parquet(filesystem, path) as parquet:
            schema = parquet.schema_arrow
            image_field(schema, path, columns.image)
            column = label_field(schema, path, columns.label).name
            labels.append(_labels(parquet.read(columns=[column]).column(0), path))
            feature = features_of(schema.metadata, path).get(column)
            listed = class_names(feature.get("names") if isinstance(feature, dict) else None, path)
            names.append(_agreed(listed, (described or {}).get(column), path))
            used.append(column)
            if SPLIT_COLUMN in set(schema.names) - {column}:
                values = parquet.read(columns=[SPLIT_COLUMN]).column(0)
                notes += split_notes(values.to_pylist(), path.rpartition("/")[2])
        if (names[-1] != names[0] or labels[-1].dtype.kind != labels[0].dtype.kind
                or used[-1] != used[0]):
            raise InputError(f"{path} names other classes than {paths[0]}; allowed: the same "
                             "class names in every file of a split")
    table = _row_table(filesystem, paths, [len(column) for column in labels], columns.image)
    return LabelledSplit(table, np.concatenate(labels), names[0], column=used[0],
                         notes=tuple(notes))


def _agreed(own: tuple[str, ...] | None, described: tuple[str, ...] | None,
            path: str) -> tuple[str, ...] | None:
    """Class names of a file or of the README.md. Raises: InputError where the two differ."""
    if own is not None and described is not None and own != described:
        raise InputError(f"{path} and the README.md of its data set name different classes "
                         f"({', '.join(own[:3])}... and {', '.join(described[:3])}...); allowed: "
                         "the same names, or none in the README.md")
    return own if own is not None else described


def _labels(column: Any, path: str) -> npt.NDArray[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.string())
    named = (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
             or pa.types.is_string_view(column.type))
    if not named and not pa.types.is_integer(column.type):
        raise InputError(f"labels of {path} have type {column.type}; allowed: whole numbers or "
                         "names")
    if column.null_count:
        raise InputError(f"{path} has {column.null_count} rows without a label; allowed: a label "
                         "in every row")
    if named:
        texts = column.to_pylist()
        if "" in texts:
            raise InputError(f"label of {path}#{texts.index('')} is empty; allowed: a label in "
                             "every row")
        return np.array(texts, dtype=str)
    label_N: npt.NDArray[Any] = column.to_numpy().astype(np.int64)
    if len(label_N) and label_N.min() < 0:
        raise InputError(f"label of {path}#{int(label_N.argmin())} is {label_N.min()}; allowed: "
                         "0 or more")
    return label_N
