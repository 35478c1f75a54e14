"""Labelled image data sets as they lie on disk or in a bucket: Parquet files, image folders.

A data set has parts (train, test, validation). They are told apart by sub-folders (`train/`,
`test/`, `val/`) or by the names of Parquet files (`train-00000-of-00004.parquet`,
`test.parquet`). One listing of the tree says what is there; of Parquet files only the label
column is read, of images nothing.

Shape suffix: N images of a part.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from partialhn.errors import InputError
from partialhn.stream import ImageTable, image_field

LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Names a Parquet column of labels may have, the first one found counts."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""Files taken for images."""
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test",
         "val": "validation", "valid": "validation", "validation": "validation"}
"""Names of folders, and first words of Parquet files' names, that say which part it is."""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One labelled data set; the labels of its tables index `classes`."""

    where: str
    classes: tuple[str, ...]
    train: ImageTable
    validation: ImageTable | None
    test: ImageTable | None


@dataclasses.dataclass(frozen=True)
class _Part:
    """Images with the labels as found: whole numbers, or names."""

    images: ImageTable
    label_N: npt.NDArray[Any]
    names: tuple[str, ...] | None
    """Class names by label, where the data says them."""


def locate(data: str, filesystem: Any = None) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URI, and the path in it.

    Raises: InputError for a scheme that needs a filesystem of its own.
    """
    scheme, colon, rest = data.partition("://")
    if filesystem is None and colon and scheme != "file":
        raise InputError(f"{data!r} has the scheme {scheme!r}; without a filesystem of its own "
                         "allowed: a local path or file://")
    path = rest if colon else data
    filesystem = filesystem or pyarrow.fs.LocalFileSystem()
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        path = Path(path).expanduser().absolute().as_posix()
    return filesystem, path.rstrip("/") or "/"


def read_sets(data: str, limit: int | None = None,
              filesystem: Any = None) -> ImageSet | dict[str, ImageSet]:
    """The data set at a path, or the data sets of a directory of tasks by name.

    Args:
        data: path or URI of a Parquet file, of a data set's folder, or of a directory of tasks.
        limit: use only the classes labelled 0 to limit-1.
        filesystem: where the path is; default: local.

    Raises: InputError for anything that cannot be used, naming it.
    """
    filesystem, root = locate(data, filesystem)
    listing = _list_paths(filesystem, root, data)
    if listing is None:
        return _assemble(data, {"train": _parquet_part(filesystem, [root])}, limit)
    parts = _read_parts(filesystem, root, listing)
    if parts is not None:
        return _assemble(data, parts, limit)
    folders, _ = _split_top(listing)
    tasks = {name: _read_parts(filesystem, f"{root}/{name}", inside)
             for name, inside in folders.items()}
    if any(tasks.values()):
        return _assemble_tasks(data, tasks, limit)
    if any(_images(inside) for inside in folders.values()):
        return _assemble(data, {"train": _folder_part(filesystem, root, listing)}, limit)
    raise InputError(f"no images found in {data!r} ({sum(p[-1] != '/' for p in listing)} other "
                     "files); allowed: Parquet files with images and labels, "
                     "train/<class>/<image>, or a directory of tasks of either form")


def open_images(data: str, filesystem: Any = None) -> ImageTable:
    """All images at a path, without their labels: for prediction.

    Args:
        data: an image file, a Parquet file, or a folder of either (searched deeply).
        filesystem: where the path is; default: local.

    Raises: InputError for a missing path, or where there are no images.
    """
    filesystem, root = locate(data, filesystem)
    listing = _list_paths(filesystem, root, data, (*SUFFIXES, ".parquet"))
    paths = [root] if listing is None else [f"{root}/{path}" for path in sorted(listing)]
    parquet = _parquet(paths)
    if parquet:
        rows = []
        for path in parquet:
            with _open_parquet(filesystem, path) as opened:
                image_field(opened.schema_arrow, path)
                rows.append(opened.metadata.num_rows)
        return _parquet_table(filesystem, parquet, rows)
    images = _images(paths)
    if not images:
        raise InputError(f"no images found in {data!r}; allowed: Parquet files, or images ending "
                         f"in {' '.join(SUFFIXES)}")
    return _file_table(filesystem, images)


def _list_paths(filesystem: Any, root: str, data: str,
          suffixes: Sequence[str] = (".parquet",)) -> list[str] | None:
    """Paths below a folder, sub-folders with a slash at the end; None for a single file."""
    info = filesystem.get_file_info(root)
    if info.type == pyarrow.fs.FileType.NotFound:
        raise InputError(f"data {data!r} does not exist; allowed: the path of a Parquet file, "
                         "an image folder or a directory of tasks, torchvision:NAME, or digits")
    if info.type != pyarrow.fs.FileType.Directory:
        if not root.lower().endswith(tuple(suffixes)):
            raise InputError(f"data {data!r} is a file; allowed: a folder, or a file ending in "
                             f"{' '.join(suffixes)}")
        return None
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    paths = (entry.path[len(root):].lstrip("/")
             + "/" * (entry.type == pyarrow.fs.FileType.Directory) for entry in found)
    return sorted(path for path in paths if not re.search(r"(^|/)(\.|__MACOSX/)", path))


def _split_top(listing: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
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


def _images(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.lower().endswith(SUFFIXES)]


def _parquet(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path.lower().endswith(".parquet")]


def _read_parts(filesystem: Any, root: str, listing: Sequence[str]) -> dict[str, _Part] | None:
    """The parts of the data set in a folder; None where the folder is not a data set."""
    folders, files = _split_top(listing)
    named = [name for name in folders if name.lower() in PARTS]
    if _parquet(files) and named:
        raise InputError(f"{root} has both {_parquet(files)[0]} and the folder {named[0]}/; "
                         "allowed: parts as Parquet files or as folders, not both")
    if _parquet(files):
        by_part: dict[str, list[str]] = {}
        for name in _parquet(files):
            word = re.match(r"[a-z]*", name.lower())
            by_part.setdefault(PARTS.get(word[0], "") if word else "", []).append(name)
        if "" in by_part and len(by_part) > 1:
            raise InputError(f"{root}/{by_part[''][0]} stands beside files named after parts; "
                             f"allowed: names that start with {', '.join(PARTS)}")
        return {part or "train": _parquet_part(filesystem, [f"{root}/{name}" for name in names])
                for part, names in by_part.items()}
    parts: dict[str, _Part] = {}
    for name in named:
        part = PARTS[name.lower()]
        if part in parts:
            raise InputError(f"{root} has more than one {part} folder, one of them {name!r}; "
                             "allowed: one")
        parts[part] = _read_folder(filesystem, f"{root}/{name}", folders[name])
    return parts or None


def _read_folder(filesystem: Any, folder: str, inside: Sequence[str]) -> _Part:
    if _parquet(inside):
        return _parquet_part(filesystem, [f"{folder}/{path}" for path in _parquet(inside)])
    return _folder_part(filesystem, folder, inside)


def _folder_part(filesystem: Any, folder: str, inside: Sequence[str]) -> _Part:
    """`<class>/.../<image>`: the classes are the top folders in sorted order."""
    folders, files = _split_top(inside)
    if _images(files):
        raise InputError(f"image {folder}/{_images(files)[0]} lies in no class folder; allowed: "
                         f"{folder}/<class>/<image>")
    images = [(name, path) for name in sorted(folders) for path in _images(folders[name])]
    if not images:
        raise InputError(f"no images found in {folder}; allowed: {folder}/<class>/<image>, with "
                         f"images ending in {' '.join(SUFFIXES)}, or Parquet files")
    table = _file_table(filesystem, [f"{folder}/{name}/{path}" for name, path in images])
    return _Part(table, np.array([name for name, _ in images]), tuple(sorted(folders)))


def _file_table(filesystem: Any, paths: Sequence[str]) -> ImageTable:
    unknown_N = np.full(len(paths), -1)
    return ImageTable(filesystem, tuple(paths), np.arange(len(paths)), unknown_N, unknown_N)


@contextlib.contextmanager
def _open_parquet(filesystem: Any, path: str) -> Iterator[Any]:
    try:
        with filesystem.open_input_file(path) as source:
            yield pq.ParquetFile(source)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is no readable Parquet file: {error}") from error


def _parquet_table(filesystem: Any, paths: Sequence[str], rows: Sequence[int]) -> ImageTable:
    row_N = np.concatenate([np.arange(count) for count in rows])
    file_N = np.repeat(np.arange(len(rows)), rows)
    return ImageTable(filesystem, tuple(paths), file_N, row_N, np.full(len(row_N), -1))


def _parquet_part(filesystem: Any, paths: Sequence[str]) -> _Part:
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
                             "class names in every file of a part")
    table = _parquet_table(filesystem, paths, [len(column) for column in columns])
    return _Part(table, np.concatenate(columns), names[0])


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


def _assemble(where: str, parts: Mapping[str, _Part], limit: int | None) -> ImageSet:
    """Numbers the classes, and keeps the first `limit` of them."""
    if "train" not in parts:
        raise InputError(f"{where} has only a {' and a '.join(parts)} part; it needs images to "
                         "train on, in train/ or train*.parquet")
    if not len(parts["train"].images):
        raise InputError(f"no images found in the train part of {where}; every class needs one")
    keys_K, classes = _keys(parts["train"], limit)
    if limit is not None and limit > len(classes):
        raise InputError(f"classes is {limit} but {where} has {len(classes)}; allowed: 2 to "
                         f"{len(classes)}")
    keep = limit or len(classes)
    tables = {name: _number(part, name, parts["train"], keys_K, keep)
              for name, part in parts.items()}
    count_K = np.bincount(tables["train"].label_N, minlength=keep)
    empty = [classes[label] for label in np.flatnonzero(count_K == 0)]
    if empty:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise InputError(f"class {empty[0]!r}{more} has no training images in {where}; every "
                         f"class needs one, or use fewer classes (classes is {limit or 'all'})")
    return ImageSet(where, tuple(classes[:keep]), tables["train"], tables.get("validation"),
                    tables.get("test"))


def _keys(train: _Part, limit: int | None) -> tuple[npt.NDArray[Any], list[str]]:
    """All labels that may occur, ascending, and their names."""
    if train.label_N.dtype.kind == "U":
        keys_K = np.unique(train.label_N) if train.names is None else np.array(train.names)
        return keys_K, keys_K.tolist()
    if train.names is not None:
        return np.arange(len(train.names)), list(train.names)
    keys_K = np.unique(train.label_N)
    if limit is not None and limit <= keys_K[-1]:
        keys_K = np.union1d(keys_K, np.arange(limit))
    return keys_K, [str(key) for key in keys_K.tolist()]


def _number(part: _Part, name: str, train: _Part, keys_K: npt.NDArray[Any],
            keep: int) -> ImageTable:
    """A part's images of the first `keep` classes, their labels numbered from 0."""
    label_N = part.label_N
    if label_N.dtype.kind != keys_K.dtype.kind or (label_N.dtype.kind == "i" and part.names
                                                   and train.names
                                                   and part.names != train.names):
        raise InputError(f"the {name} part ({part.images.files[0]}) names other classes than the "
                         f"train part ({train.images.files[0]}); allowed: the same class names")
    place_N = np.searchsorted(keys_K, label_N)
    place_N = place_N.clip(max=len(keys_K) - 1)
    unknown = np.flatnonzero(keys_K[place_N] != label_N)
    if len(unknown):
        first = part.images.take(unknown[:1]).ids()[0]
        wrong = ("never occurs in training" if part is not train
                 else f"is none of the {len(keys_K)} named classes")
        raise InputError(f"label {label_N[unknown[0]].item()!r} of the {name} image {first} "
                         f"{wrong}; allowed: labels of training images")
    kept = np.flatnonzero(place_N < keep)
    return dataclasses.replace(part.images, label_N=place_N).take(kept)


def _assemble_tasks(data: str, tasks: Mapping[str, dict[str, _Part] | None],
                    limit: int | None) -> dict[str, ImageSet]:
    if limit is not None:
        raise InputError(f"classes is {limit} but {data!r} is a directory of tasks, each with its "
                         "own classes; allowed: leave classes out")
    seen: dict[str, str] = {}
    for name, parts in tasks.items():
        if parts is None:
            raise InputError(f"{data!r} is a directory of tasks but {name!r} has no train part; "
                             f"allowed: {name}/train/<class>/<image> or {name}/train*.parquet")
        if name.casefold() in seen:
            raise InputError(f"duplicate task names {seen[name.casefold()]!r} and {name!r} in "
                             f"{data!r}; allowed: names that differ in more than case")
        seen[name.casefold()] = name
    ordered = sorted(tasks, key=lambda name: [(int(part), part) if part.isdigit() else (0, part)
                                              for part in re.split(r"(\d+)", name)])
    return {name: _assemble(f"{data}/{name}", tasks[name] or {}, None) for name in ordered}
