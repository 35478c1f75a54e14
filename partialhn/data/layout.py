"""Labelled image data sets as they lie on disk or in a bucket: Parquet files, image folders.

A data set has splits (train, test, validation). They are told apart by sub-folders (`train/`,
`test/`, `val/`) or by the names of Parquet files (`train-00000-of-00004.parquet`,
`test.parquet`). One listing of the tree says what is there; of Parquet files only the label
column is read, of images nothing.

Shape suffix: N images of a split.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow.fs

from partialhn.data.files import (
    LabelledSplit,
    file_table,
    folder_split,
    parquet_split,
    parquet_table,
)
from partialhn.data.image_table import ImageTable
from partialhn.data.listing import (
    SUFFIXES,
    NotUsed,
    described,
    image_paths,
    is_junk,
    parquet_paths,
    split_of_folder,
    split_top,
    splits_of_files,
    unused,
)
from partialhn.errors import InputError


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """One labelled data set; the labels of its tables index `classes`."""

    where: str
    classes: tuple[str, ...]
    train: ImageTable
    validation: ImageTable | None
    test: ImageTable | None
    not_used: NotUsed | None = None
    """Other files of the data set's folder, and classes without an image."""


def locate(data: str, filesystem: Any = None) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URI, and the path in it.

    Raises: InputError for a scheme that needs a filesystem of its own.
    """
    scheme, colon, rest = data.partition("://")
    if filesystem is None and colon and scheme != "file":
        raise InputError(f"{data!r} has the scheme {scheme!r}; without a filesystem of its own "
                         "allowed: a local path or file://")
    path = unquote(rest) if colon and scheme == "file" else rest if colon else data
    filesystem = filesystem or pyarrow.fs.LocalFileSystem()
    if isinstance(filesystem, pyarrow.fs.LocalFileSystem):
        path = Path(path).expanduser().absolute().as_posix()
    return filesystem, path.rstrip("/") or "/"


def read_sets(data: str, limit: int | None = None, filesystem: Any = None, *,
              arrivals_beside: bool = False) -> ImageSet | dict[str, ImageSet]:
    """The data set at a path, or the data sets of a directory of tasks by name.

    Args:
        data: path or URI of a Parquet file, of a data set's folder, or of a directory of tasks.
        limit: use only the classes labelled 0 to limit-1.
        filesystem: where the path is; default: local.
        arrivals_beside: folders beside the splits are other data, as in the inbox; elsewhere
            they are refused, because their images would be left out without a word.

    Raises: InputError for anything that cannot be used, naming it.
    """
    filesystem, root = locate(data, filesystem)
    paths = _list_paths(filesystem, root, data)
    if paths is None:
        return _assemble(data, _Splits({"train": parquet_split(filesystem, [root])}), limit)
    root, listing = (root, paths) if arrivals_beside else _inner(root, paths)
    splits = _read_splits(filesystem, root, listing, arrivals_beside)
    if splits is not None:
        return _assemble(data, splits, limit)
    folders, _ = split_top(listing)
    tasks = {name: _read_splits(filesystem, f"{root}/{name}", inside, arrivals_beside)
             for name, inside in folders.items()}
    if any(tasks.values()):
        return _assemble_tasks(data, tasks, limit)
    if any(image_paths(inside) for inside in folders.values()):
        train = folder_split(filesystem, root, listing)
        return _assemble(data, _Splits({"train": train}, unused(listing, train.paths)), limit)
    raise InputError(f"no images found in {data!r} ({described(unused(listing, ())) or 'empty'}); "
                     "allowed: Parquet files with images and labels, "
                     "train/<class>/<image>, or a directory of tasks of either form")


def _inner(root: str, listing: list[str]) -> tuple[str, list[str]]:
    """The folder that holds the data set: `data/` of a data set's repository, where that is the
    only folder, beside its README and licence.
    """
    folders, files = split_top(listing)
    if list(folders) != ["data"] or parquet_paths(files) or image_paths(files):
        return root, listing
    return f"{root}/data", folders["data"]


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
    parquet = parquet_paths(paths)
    if parquet:
        return parquet_table(filesystem, parquet)
    images = image_paths(paths)
    if not images:
        raise InputError(f"no images found in {data!r}; allowed: Parquet files, or images ending "
                         f"in {' '.join(SUFFIXES)}")
    return file_table(filesystem, images)


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
    return sorted(path for path in paths if not is_junk(path))


@dataclasses.dataclass(frozen=True)
class _Splits:
    """The splits of one data set by name, and the files that none of them uses."""

    splits: Mapping[str, LabelledSplit]
    unused: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _read_splits(filesystem: Any, root: str, listing: Sequence[str],
                 arrivals_beside: bool) -> _Splits | None:
    """The splits of the data set in a folder; None where the folder is not a data set."""
    folders, files = split_top(listing)
    named = {name: split for name in folders if (split := split_of_folder(name))}
    if parquet_paths(files) and named:
        raise InputError(f"{root} has both {parquet_paths(files)[0]} and the folder "
                         f"{next(iter(named))}/; allowed: splits as Parquet files or as folders, "
                         "not both")
    if not named and not parquet_paths(files):
        return None
    if not arrivals_beside:
        _refuse_beside(root, folders, named)
        mine = list(listing)
    else:
        mine = [path for path in listing if "/" not in path or path.partition("/")[0] in named]
    if parquet_paths(files):
        return _Splits({split: parquet_split(filesystem, [f"{root}/{name}" for name in names])
                        for split, names in splits_of_files(root, parquet_paths(files)).items()},
                       unused(mine, parquet_paths(files)))
    splits: dict[str, LabelledSplit] = {}
    used: list[str] = []
    for name, split in named.items():
        if split in splits:
            raise InputError(f"{root} has more than one {split} folder, one of them {name!r}; "
                             "allowed: one")
        splits[split] = _read_folder(filesystem, f"{root}/{name}", folders[name])
        used += [f"{name}/{path}" for path in
                 splits[split].paths or parquet_paths(folders[name])]
    return _Splits(splits, unused(mine, used))


def _refuse_beside(root: str, folders: Mapping[str, Sequence[str]],
                   named: Mapping[str, str]) -> None:
    """Raises InputError where a folder beside the splits holds images."""
    for name, inside in folders.items():
        images = image_paths(inside) + parquet_paths(inside)
        if name not in named and images:
            raise InputError(f"{root}/{name} holds {len(images):,} images or Parquet files and "
                             "does not say which split it is; allowed: a name such as train, "
                             "test_set or validation, or another place for it")


def _read_folder(filesystem: Any, folder: str, inside: Sequence[str]) -> LabelledSplit:
    if parquet_paths(inside):
        return parquet_split(filesystem, [f"{folder}/{path}" for path in parquet_paths(inside)])
    return folder_split(filesystem, folder, inside)


def _assemble(where: str, given: _Splits, limit: int | None) -> ImageSet:
    """Numbers the classes, keeps the first `limit` of them, and leaves out those without images."""
    splits = given.splits
    if "train" not in splits:
        raise InputError(f"{where} has only a {' and a '.join(splits)} split; it needs images to "
                         "train on, in train/ or train*.parquet")
    if not len(splits["train"].images):
        raise InputError(f"no images found in the train split of {where}; every class needs one")
    keys_K, classes = _keys(splits["train"], limit)
    if limit is not None and limit > len(classes):
        raise InputError(f"classes is {limit} but {where} has {len(classes)}; allowed: 2 to "
                         f"{len(classes)}")
    keep = limit or len(classes)
    tables = {name: _number(split, name, splits["train"], keys_K, keep)
              for name, split in splits.items()}
    names, tables, absent = _present(where, classes[:keep], tables)
    return ImageSet(where, names, tables["train"], tables.get("validation"), tables.get("test"),
                    NotUsed(where, given.unused, absent))


def _present(where: str, classes: Sequence[str], tables: dict[str, ImageTable],
             ) -> tuple[tuple[str, ...], dict[str, ImageTable], tuple[str, ...]]:
    """The classes that have images, the tables numbered by them, and the classes left out.

    Raises: InputError for a class whose only images are in other splits than train.
    """
    counts_K = {name: np.bincount(table.label_N, minlength=len(classes))
                for name, table in tables.items()}
    total_K = np.sum(list(counts_K.values()), axis=0)
    for label in np.flatnonzero((counts_K["train"] == 0) & (total_K > 0)).tolist():
        raise InputError(f"class {classes[label]!r} has no training images in {where}, but "
                         f"{total_K[label]} in its other splits; allowed: training images of "
                         "every class")
    if not total_K.any() or total_K.all():
        return tuple(classes), tables, ()
    number_K = np.cumsum(total_K > 0) - 1
    tables = {name: dataclasses.replace(table, label_N=number_K[table.label_N])
              for name, table in tables.items()}
    return (tuple(name for name, count in zip(classes, total_K, strict=True) if count), tables,
            tuple(name for name, count in zip(classes, total_K, strict=True) if not count))


def _keys(train: LabelledSplit, limit: int | None) -> tuple[npt.NDArray[Any], list[str]]:
    """All labels that may occur, ascending, and their names."""
    if train.label_N.dtype.kind == "U":
        keys_K = np.unique(train.label_N if train.names is None else np.array(train.names))
        return keys_K, keys_K.tolist()
    if train.names is not None:
        return np.arange(len(train.names)), list(train.names)
    keys_K = np.unique(train.label_N)
    if limit is not None and limit <= keys_K[-1]:
        keys_K = np.union1d(keys_K, np.arange(limit))
    return keys_K, [str(key) for key in keys_K.tolist()]


def _number(split: LabelledSplit, name: str, train: LabelledSplit, keys_K: npt.NDArray[Any],
            keep: int) -> ImageTable:
    """A split's images of the first `keep` classes, their labels numbered from 0."""
    label_N = split.label_N
    numbered = label_N.dtype.kind == "i" and None not in (split.names, train.names)
    if label_N.dtype.kind != keys_K.dtype.kind or (numbered and split.names != train.names):
        raise InputError(f"the {name} split ({split.images.files[0]}) names other classes than the "
                         f"train split ({train.images.files[0]}); allowed: the same class names")
    place_N = np.searchsorted(keys_K, label_N).clip(max=len(keys_K) - 1)
    unknown = np.flatnonzero(keys_K[place_N] != label_N)
    if len(unknown):
        first = split.images.take(unknown[:1]).ids()[0]
        wrong = ("never occurs in training" if split is not train
                 else f"is none of the {len(keys_K)} named classes")
        raise InputError(f"label {label_N[unknown[0]].item()!r} of the {name} image {first} "
                         f"{wrong}; allowed: labels of training images")
    kept = np.flatnonzero(place_N < keep)
    return dataclasses.replace(split.images, label_N=place_N).take(kept)


def _assemble_tasks(data: str, tasks: Mapping[str, _Splits | None],
                    limit: int | None) -> dict[str, ImageSet]:
    if limit is not None:
        raise InputError(f"classes is {limit} but {data!r} is a directory of tasks, each with its "
                         "own classes; allowed: leave classes out")
    seen: dict[str, str] = {}
    for name, splits in tasks.items():
        if splits is None or "train" not in splits.splits:
            raise InputError(f"{data!r} is a directory of tasks but {name!r} has no train split; "
                             f"allowed: {name}/train/<class>/<image> or {name}/train*.parquet")
        if name.casefold() in seen:
            raise InputError(f"duplicate task names {seen[name.casefold()]!r} and {name!r} in "
                             f"{data!r}; allowed: names that differ in more than case")
        seen[name.casefold()] = name
    ordered = sorted(tasks, key=lambda name: [(int(word), word) if word.isdigit() else (0, word)
                                              for word in re.split(r"(\d+)", name)])
    return {name: _assemble(f"{data}/{name}", tasks[name] or _Splits({}), None)
            for name in ordered}
