"""Slots: the tasks of a model in the order of learning, each with its stored features.

A task that gets more data is learned again in a new slot, named `<task>/<part>`; the model uses
the newest slot of a task for its predictions. Earlier slots do not change. A slot `<task>/=<part>`
is learned from its own data alone, and may have other classes.
"""

import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from typing import cast

from partialhn.config import Config
from partialhn.data.experience import Experience, slots_behind
from partialhn.features.extract import feature_jobs, find_features
from partialhn.features.feature_set import FeatureSet, UnopenedFeatures, join
from partialhn.features.jobs import FeatureJob, Split
from partialhn.features.manifest import Manifest
from partialhn.features.store import FeatureStore
from partialhn.networks.trunk import Trunk
from partialhn.training.experience import TaskFeatures


@dataclasses.dataclass(frozen=True)
class Slot:
    """One learned task, or one to be learned, without its images."""

    name: str
    classes: tuple[str, ...]
    fingerprint: str
    """Fingerprint of the task's data: `Experience.fingerprint`."""
    transform: str
    manifests: Mapping[Split, Manifest]
    """Stored features by split; a task that is already learned needs only its test split."""


def slots_of(experiences: Sequence[Experience], jobs: Sequence[FeatureJob],
             manifests: Sequence[Manifest | None]) -> list[Slot]:
    """The slots of experiences, with their stored features.

    manifests: one for each job; None if its features are not stored.
    """
    by_task: dict[str, dict[Split, Manifest]] = {}
    for job, manifest in zip(jobs, manifests, strict=True):
        if manifest is not None:
            by_task.setdefault(job.task, {})[job.split] = manifest
    return [Slot(experience.name, experience.classes, experience.fingerprint,
                 experience.transform, by_task.get(experience.name, {}))
            for experience in experiences]


def needed_jobs(jobs: Sequence[FeatureJob], learned: Sequence[str]) -> list[FeatureJob]:
    """The jobs whose features a run needs: all splits, but of learned tasks only the test split."""
    return [job for job in jobs if job.split == "test" or job.task not in learned]


def featured_slots(config: Config, experiences: Sequence[Experience], learned: int, trunk: Trunk,
                   store: FeatureStore,
                   compute: Callable[[list[FeatureJob]], int]) -> tuple[list[Slot], int]:
    """The slots of experiences with their stored features, and how many images were decoded.

    The first `learned` tasks need no training features, unless the strategy needs every task's.
    `compute` stores the features of the given jobs and returns how many images it decoded.
    """
    first = 0 if config.train.needs_every_task else learned
    jobs = feature_jobs(config, experiences, trunk)
    decoded = compute(needed_jobs(jobs, [task.name for task in experiences[:first]]))
    return stored_slots(config, experiences, trunk, store), decoded


def stored_slots(config: Config, experiences: Sequence[Experience], trunk: Trunk,
                 store: FeatureStore) -> list[Slot]:
    """The slots of experiences, each with its stored features."""
    jobs = feature_jobs(config, experiences, trunk)
    manifests = find_features(store, jobs)
    return slots_of(experiences, jobs, [manifests.get(job.recipe.key) for job in jobs])


def open_task_features(store: FeatureStore, slots: Sequence[Slot],
                       learn: Container[int] | None = None) -> list[TaskFeatures]:
    """Opens the features to learn the slots with an index in `learn` (default: all). Those to test
    each slot are opened when they are first used.

    A slot that refreshes a task is learned and tested on that task's images from all its slots,
    from the newest one that replaces the task's data.
    Raises: IntegrityError for damaged features.
    """
    opened: dict[str, FeatureSet] = {}
    behind = slots_behind([slot.name for slot in slots])

    def manifests_of(index: int, split: Split) -> list[Manifest]:
        return [slots[place].manifests[split] for place in behind[index]
                if split in slots[place].manifests]

    def joined(manifests: Sequence[Manifest]) -> FeatureSet | None:
        for manifest in manifests:
            if manifest.key not in opened:
                opened[manifest.key] = store.open(manifest)
        return join([opened[manifest.key] for manifest in manifests])

    def tested(index: int) -> FeatureSet:
        manifests = manifests_of(index, "test")
        assert manifests, f"task {slots[index].name} has no test features"
        return UnopenedFeatures(manifests, lambda: cast(FeatureSet, joined(manifests)))

    tasks = []
    for index, slot in enumerate(slots):
        train, validation = (map(joined, (manifests_of(index, "train"),
                                          manifests_of(index, "validation")))
                             if learn is None or index in learn else (None, None))
        tasks.append(TaskFeatures(slot.name, len(slot.classes), train, validation, tested(index),
                                  behind[index][-2] if len(behind[index]) > 1 else None,
                                  tuple(slot.classes)))
    return tasks


def images_behind(slots: Sequence[Slot], index: int, split: Split) -> int:
    """Number of images of a split that a slot is learned or tested on: its own, and those of the
    slots that it refreshes.
    """
    behind = [slots[place] for place in slots_behind([slot.name for slot in slots])[index]]
    return sum(slot.manifests[split].rows for slot in behind if split in slot.manifests)
