"""One labelled data set: its splits as they were found, their classes numbered alike.

Shape suffixes: N images of a split; K classes.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from partialhn.data.files import LabelledSplit
from partialhn.data.image_table import ImageTable
from partialhn.data.listing import NotUsed, described
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


@dataclasses.dataclass(frozen=True)
class FoundSplits:
    """The splits of one data set by name, and what none of them uses."""

    splits: Mapping[str, LabelledSplit]
    unused: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Numbers of files by kind."""
    notes: tuple[str, ...] = ()


def assemble(where: str, found: FoundSplits, limit: int | None) -> ImageSet:
    """Numbers the classes, keeps the first `limit` of them, and leaves out those without images."""
    splits = found.splits
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
                    NotUsed(where, found.unused, absent, (*found.notes, *_alike(names))))


def _alike(classes: Sequence[str]) -> list[str]:
    """A note for each pair of classes whose names differ in case or spaces only."""
    first: dict[str, str] = {}
    notes = []
    for name in classes:
        other = first.setdefault(" ".join(name.casefold().split()), name)
        if other != name:
            notes.append(f"the classes {other!r} and {name!r} differ in case or spaces only, and "
                         "are two classes")
    return notes


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
    if (label_N.dtype.kind != keys_K.dtype.kind or split.column != train.column
            or (numbered and split.names != train.names)):
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


def assemble_tasks(data: str, tasks: Mapping[str, FoundSplits | None],
                   limit: int | None, beside: Mapping[str, int]) -> dict[str, ImageSet]:
    """The data sets of a directory of tasks, in natural order of their names.

    limit: as for one data set, where there is one task only. beside: numbers of the files that lie
    beside the tasks' folders, by kind.

    Raises: InputError for names that differ in case only, or a folder without a train split.
    """
    if limit is not None and len(tasks) > 1:
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
    found = {name: tasks[name] or FoundSplits({}) for name in ordered}
    if beside:
        first = found[ordered[0]]
        note = f"beside the tasks of {data} lie {described(beside)} files, which are not used"
        found[ordered[0]] = dataclasses.replace(first, notes=(*first.notes, note))
    return {name: assemble(f"{data}/{name}", splits, limit) for name, splits in found.items()}
