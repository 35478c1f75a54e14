"""The seeded splits of one data set into tasks, and of a class's images into held-out shares.

Shape suffix: N images of a table.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from partialhn.config import DataConfig
from partialhn.data.image_set import ImageSet
from partialhn.data.image_table import ImageTable, IntArray
from partialhn.errors import InputError
from partialhn.numbers import counted


def split_classes(class_count: int, tasks: int | None, task_sizes: Sequence[int] | None,
                  seed: int | None) -> list[tuple[int, ...]]:
    """Class-incremental split: a seeded permutation of the classes, or for None the classes in the
    order of their labels, cut into T disjoint tasks.

    Without `task_sizes` the tasks are as even as possible, the larger ones first. The classes of
    a task are listed in ascending order.

    Raises: InputError for more tasks than classes, sizes that do not sum to the classes, or
    neither a number of tasks nor sizes.
    """
    if task_sizes is None:
        if tasks is None:
            raise InputError(f"tasks is not given; allowed: 1 to {class_count}, the number of "
                             f"tasks to cut the {class_count} classes into")
        if not 1 <= tasks <= class_count:
            raise InputError(f"tasks is {tasks} but there are {class_count} classes; allowed: "
                             f"1 to {class_count}")
        task_sizes = [class_count // tasks + (t < class_count % tasks) for t in range(tasks)]
    if tasks is not None and len(task_sizes) != tasks:
        raise InputError(f"task_sizes has {len(task_sizes)} counts for {tasks} tasks; allowed: "
                         "one count a task")
    if min(task_sizes) < 1 or sum(task_sizes) != class_count:
        raise InputError(f"task_sizes {' '.join(map(str, task_sizes))} sum to {sum(task_sizes)} "
                         f"but there are {class_count} classes; allowed: positive counts that "
                         f"sum to {class_count}")
    order = (np.arange(class_count) if seed is None
             else np.random.default_rng([seed, 0]).permutation(class_count))
    return [tuple(sorted(part.tolist())) for part in np.split(order, np.cumsum(task_sizes)[:-1])]


def held_out(label_N: IntArray, share: float, key: str, classes: Sequence[str],
             seed: int) -> npt.NDArray[np.bool_]:
    """Marks a seeded share of every class: at least one image, and at least one is left.

    What is drawn from a class depends on its own images alone, not on the other classes.

    Args:
        label_N: class of each image.
        share: 0 to 0.5; 0 marks nothing.
        key: `test` or `validation`; each draws anew.
        classes: their names, for the message.
        seed: of the draw.

    Raises: InputError naming a class with fewer than two images.
    """
    marked_N = np.zeros(len(label_N), dtype=bool)
    if share == 0:
        return marked_N
    order_N = np.argsort(label_N, kind="stable")
    ends = np.cumsum(np.bincount(label_N, minlength=len(classes)))
    for label, of_class in enumerate(np.split(order_N, ends[:-1])):
        if len(of_class) < 2:
            remedy = "" if key == "test" else ", or validation 0"
            raise InputError(f"class {classes[label]!r} has {counted(len(of_class), 'image')}, "
                             f"too few to hold out {share:g} for {key}; allowed: 2 or more{remedy}")
        rng = np.random.default_rng([seed, 1 if key == "test" else 2, label])
        count = max(1, round(share * len(of_class)))
        marked_N[rng.permutation(of_class)[:count]] = True
    return marked_N


def cut_classes(images: ImageSet, config: DataConfig) -> dict[str, ImageSet]:
    """Class-incremental split of one data set into tasks named 0 to T-1."""
    parts = split_classes(len(images.classes), config.tasks, config.task_sizes,
                          config.stream_seed if config.class_order == "shuffled" else None)
    return {str(t): _subset(images, labels) for t, labels in enumerate(parts)}


def cut_domains(images: ImageSet, config: DataConfig) -> dict[str, ImageSet]:
    """Tasks 0 to T-1 of all classes: each class's images are dealt out among them, seeded."""
    if config.task_transforms is None:
        raise InputError("task_transforms is not given; allowed where the stream is 'domains': one "
                         "a task")
    count = len(config.task_transforms)
    if config.task_sizes is not None or config.tasks not in (None, count):
        raise InputError(f"stream is 'domains' with {count} task_transforms; allowed: no "
                         f"task_sizes, and tasks {count} or left out")

    def share(table: ImageTable | None, part: int, task: int) -> ImageTable | None:
        if table is None:
            return None
        order_N = np.random.default_rng([config.stream_seed, 3, part]).permutation(len(table))
        place_N = _place_in_class(table.label_N, order_N)
        return table.take(place_N % count == task)

    dealt = {}
    for task in range(count):
        train, validation, test = (share(table, part, task) for part, table in enumerate(
            (images.train, images.validation, images.test)))
        assert train is not None
        missing = set(range(len(images.classes))) - set(train.label_N.tolist())
        if missing:
            raise InputError(f"class {images.classes[min(missing)]!r} of {images.where} has too "
                             f"few images for {count} tasks; allowed: one a task at least")
        dealt[str(task)] = dataclasses.replace(images, train=train, validation=validation,
                                              test=test)
    return dealt


def first_of_each_class(images: ImageSet, count: int) -> ImageSet:
    """The first images of each class, in the order of the data."""
    def first(table: ImageTable | None) -> ImageTable | None:
        return table and table.take(_place_in_class(table.label_N, np.arange(len(table))) < count)

    train = first(images.train)
    assert train is not None
    return dataclasses.replace(images, train=train, test=first(images.test))


def _place_in_class(label_N: IntArray, order_N: IntArray) -> IntArray:
    """How many images of its class come before each image, in an order of all."""
    sorted_N = order_N[np.argsort(label_N[order_N], kind="stable")]
    counts_K = np.bincount(label_N) if len(label_N) else np.zeros(0, int)
    place_N = np.empty(len(label_N), dtype=np.int64)
    place_N[sorted_N] = np.concatenate([np.arange(count) for count in counts_K] or [np.arange(0)])
    return place_N


def _subset(images: ImageSet, labels: Sequence[int]) -> ImageSet:
    """The images of some classes, which are numbered anew from 0."""
    new_K = np.full(len(images.classes), -1)
    new_K[list(labels)] = np.arange(len(labels))

    def of_classes(table: ImageTable | None) -> ImageTable | None:
        if table is None:
            return None
        label_N = new_K[table.label_N]
        return dataclasses.replace(table, label_N=label_N).take(label_N >= 0)

    train = of_classes(images.train)
    assert train is not None
    return dataclasses.replace(images, classes=tuple(images.classes[label] for label in labels),
                               train=train, validation=of_classes(images.validation),
                               test=of_classes(images.test))
