"""One task of a stream: its classes and its images, by reference."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from partialhn.data.image_table import ImageTable
from partialhn.data.listing import NotUsed
from partialhn.naming import digest


@dataclasses.dataclass(frozen=True, eq=False)
class Experience:
    """One task of the stream: its classes, and its images in three disjoint parts."""

    name: str
    classes: tuple[str, ...]
    """Class names; the labels of the three tables index them."""
    train: ImageTable
    validation: ImageTable
    """Held out to watch training; may be empty."""
    test: ImageTable
    transform: str = "none"
    """Corruption that belongs to the task's images (`partialhn.data.corruptions`)."""
    not_used: NotUsed | None = None
    """Other files and empty classes of the task's data set; the fingerprint leaves them out."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the task's data; its name does not."""
        return digest([self.train.fingerprint(), self.validation.fingerprint(),
                       self.test.fingerprint(), list(self.classes), self.transform])

    def test_images_in_training(self) -> int:
        """Number of test images that are training images too, byte for byte."""
        seen_N = np.concatenate([self.train.image_hashes(), self.validation.image_hashes()])
        return int(np.isin(self.test.image_hashes(), seen_N).sum())


RESERVED = ("auto", "none")
"""What a caller says who does not know the task, and what stands for no known task."""


def task_of(slot: str) -> str:
    """The task that a slot answers for: `cats/2026-11` is learned from more data of `cats`."""
    return slot.partition("/")[0]


def replaces(slot: str) -> bool:
    """Whether a slot's data replaces that of its task, as `cats/=2026-11` does, and not adds to it.

    No part of an inbox has a name that starts with this sign.
    """
    return slot.partition("/")[2].startswith("=")


def arrival_of(slot: str) -> str:
    """The folder of the inbox from which a slot was learned: `cats/=2026-11` lies in that part."""
    return slot.replace("/=", "/")


def refreshed(slots: Sequence[str], index: int) -> int | None:
    """The newest earlier slot of the same task, which a slot starts from.

    None for a new task, and for a slot that replaces its task's data.
    """
    task = task_of(slots[index])
    if replaces(slots[index]):
        return None
    return next((j for j in reversed(range(index)) if task_of(slots[j]) == task), None)


def newest_slots(slots: Sequence[str]) -> dict[str, int]:
    """The newest slot of every task, which answers for it, by the task's name.

    The tasks are in the order in which they were first learned: a caller who says a task by its
    number means its place here. Whatever counts tasks, or takes a mean over them, counts each once,
    by this slot: the older ones answer nothing any more.
    """
    return {task_of(name): index for index, name in enumerate(slots)}


def slots_behind(slots: Sequence[str]) -> list[list[int]]:
    """For every slot, the slots whose images it is learned and tested on, itself last.

    They are those of its task from the newest one that replaces the task's data.
    """
    by_task: dict[str, list[int]] = {}
    behind = []
    for index, name in enumerate(slots):
        task = task_of(name)
        earlier = [] if replaces(name) else by_task.get(task, [])
        by_task[task] = [*earlier, index]
        behind.append(by_task[task])
    return behind


def all_not_used(experiences: Sequence[Experience]) -> list[NotUsed]:
    """Files and classes that are not used, once for each data set of the experiences."""
    notes = {task.not_used.where: task.not_used for task in experiences if task.not_used}
    return list(notes.values())


def leaks(experiences: Sequence[Experience]) -> dict[str, int]:
    """Numbers of test images that are training images too, by task, where there are any."""
    counts = {task.name: task.test_images_in_training() for task in experiences}
    return {name: count for name, count in counts.items() if count}
