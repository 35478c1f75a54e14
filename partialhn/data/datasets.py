"""The stream of experiences that a configuration describes.

Given tasks are taken as they are; one data set is cut by a class-incremental or a domain split.

Shape suffix: N images of a table.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from partialhn.config import DataConfig
from partialhn.data import corruptions
from partialhn.data.columns import Columns
from partialhn.data.experience import RESERVED, Experience, task_of
from partialhn.data.image_set import ImageSet
from partialhn.data.image_table import ImageTable
from partialhn.data.layout import read_sets
from partialhn.data.splits import (
    cut_classes,
    cut_domains,
    first_of_each_class,
    held_out,
)
from partialhn.data.table import converted_folder
from partialhn.errors import InputError


def open_stream(config: DataConfig, cache_dir: Path, filesystem: Any = None) -> list[Experience]:
    """The stream of experiences that a configuration describes; reads labels, but no images.

    A directory of tasks gives one experience a task, in natural order of their names (task-2
    before task-10). Everything else is one data set, cut by a class-incremental split into
    experiences named 0 to T-1. Where a data set has no test part, its validation part stands in,
    or else a share of every class is held out; a share of the training images is held out for
    validation. Both draws, and the split, depend on `stream_seed` alone.

    Args:
        config: what to open.
        cache_dir: local folder for data sets that come from a library.
        filesystem: pyarrow filesystem of `config.data`; default: local.

    Raises: InputError for data or options that cannot be used, naming them.
    """
    if config.stream_seed < 0:
        raise InputError(f"stream_seed is {config.stream_seed}; allowed: 0 or more")
    sets = _read(config, cache_dir, filesystem)
    sets = (_with_held_out(sets, config) if isinstance(sets, ImageSet)
            else {name: _with_held_out(images, config) for name, images in sets.items()})
    if isinstance(sets, ImageSet):
        cut = cut_classes if config.stream == "classes" else cut_domains
        sets = cut(sets, config)
    elif config.stream == "domains":
        raise InputError(f"stream is 'domains' but {config.data!r} is a directory of {len(sets)} "
                         "tasks; allowed: one data set, or the stream classes")
    elif config.task_sizes is not None or config.tasks not in (None, len(sets)):
        option = "task_sizes" if config.task_sizes is not None else "tasks"
        raise InputError(f"{option} is given but {config.data!r} is a directory of "
                         f"{len(sets)} tasks; allowed: leave {option} out")
    transforms = config.task_transforms or ("none",) * len(sets)
    if len(transforms) != len(sets):
        raise InputError(f"task_transforms has {len(transforms)} entries for {len(sets)} tasks; "
                         "allowed: one a task")
    for transform in transforms:
        corruptions.parse(transform)
    return [_experience(name, images, transform)
            for (name, images), transform in zip(sets.items(), transforms, strict=True)]


def columns_of(config: DataConfig) -> Columns:
    """The columns that the options name."""
    return Columns(config.image_column, config.label_column)


def _read(config: DataConfig, cache_dir: Path,
          filesystem: Any) -> ImageSet | dict[str, ImageSet]:
    """The images at `config.data`: one task alone is a data set where options say how to cut it."""
    folder = converted_folder(config.data, cache_dir)
    data, chosen = (config.data, None) if folder is None else (str(folder.path), folder.chosen)
    sets = read_sets(data, config.classes, filesystem if folder is None else None,
                     columns=columns_of(config), chosen=chosen)
    is_cut = (config.task_sizes is not None or config.tasks not in (None, 1)
              or config.stream == "domains")
    if is_cut and isinstance(sets, dict) and len(sets) == 1:
        return next(iter(sets.values()))
    return sets


def given_experience(name: str, images: ImageSet, config: DataConfig, transform: str = "none",
                     classes: Sequence[str] | None = None) -> Experience:
    """One task that is a data set of its own; its missing parts are drawn as `open_stream` does.

    classes: number the labels by these classes, of which the data may show a few only.

    Raises: InputError for a class that is not among them, or data that cannot be used.
    """
    corruptions.parse(transform)
    images = _with_held_out(images, config)
    if classes is None:
        return _experience(name, images, transform)
    unknown = [label for label in images.classes if label not in classes]
    if unknown:
        raise InputError(f"class {unknown[0]!r} of {images.where} is not declared; allowed: "
                         + ", ".join(classes))
    new_K = np.array([list(classes).index(label) for label in images.classes])

    def numbered(table: ImageTable | None) -> ImageTable | None:
        return table and dataclasses.replace(table, label_N=new_K[table.label_N])

    train = numbered(images.train)
    assert train is not None
    return _experience(name, ImageSet(images.where, tuple(classes), train,
                                      numbered(images.validation), numbered(images.test),
                                      images.not_used), transform)


def _with_held_out(images: ImageSet, config: DataConfig) -> ImageSet:
    """All three parts; the missing ones are drawn from the training images."""
    if config.images_per_class is not None:
        images = first_of_each_class(images, config.images_per_class)
    train, validation, test, note = images.train, images.validation, images.test, images.not_used
    if test is None and validation is not None:
        test, validation = validation, None
        note = note and note.with_note("no split is named test, so the validation split is the "
                                       "test split, and validation images are held out")
    if test is None:
        drawn_N = held_out(train.label_N, config.test, "test", images.classes, config.stream_seed)
        train, test = train.take(~drawn_N), train.take(drawn_N)
    if validation is None:
        drawn_N = held_out(train.label_N, config.validation, "validation", images.classes,
                           config.stream_seed)
        train, validation = train.take(~drawn_N), train.take(drawn_N)
    return ImageSet(images.where, images.classes, train, validation, test, note)


def _experience(name: str, images: ImageSet, transform: str) -> Experience:
    assert images.validation is not None
    if task_of(name) in RESERVED:
        raise InputError(f"task is named {name!r}; allowed: any name but {', '.join(RESERVED)}, "
                         "which say that a task is to be inferred, or is none of those known")
    if not images.test:
        raise InputError(f"task {name!r} of {images.where} (classes {', '.join(images.classes)}) "
                         "has no test images; every task needs some")
    return Experience(name, images.classes, images.train, images.validation, images.test,
                      transform, images.not_used)
