"""Validates an arrival completely before anything is trained.

Each image is read, hashed and decoded once. The hashes of a task's images are stored, to recognise
a later task with the same images.

Legend: N images, K classes.
"""

import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from partialhn.config import DataConfig, build
from partialhn.data.corruptions import parse
from partialhn.data.datasets import columns_of, given_experience
from partialhn.data.decode import decode_images
from partialhn.data.experience import Experience, task_of
from partialhn.data.image_set import ImageSet
from partialhn.data.image_table import ImageTable
from partialhn.data.layout import read_sets
from partialhn.errors import InputError, IntegrityError
from partialhn.features.jobs import SPLITS
from partialhn.numbers import counted
from partialhn.yaml_text import read_yaml
from pipelines.platform.storage import Storage
from pipelines.retrain.inbox import DECLARATION, Arrival, Problem

MAX_LISTED = 10
"""Largest number of unreadable images that a rejection lists."""
MAX_DECLARATION = 1 << 20
"""Largest size of a `task.yaml` in bytes."""
HASH_BYTES = 8
"""Bytes kept of an image's SHA-256: among 10^7 images the chance of a false match is 10^-6."""

HashArray = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class ArrivalPolicy:
    """The limits for an arriving task; a task that does not keep them is rejected."""

    min_images_per_class: int = 4
    """Smallest number of training images of each class in the arrival, before any are held out."""
    min_test_images: int = 2
    """Smallest number of test images of the task."""
    max_duplicate_share: float = 0.1
    """Largest share of its images that one earlier task has too, byte for byte."""
    max_test_in_train: float = 0.1
    """Largest share of its test images that are training images as well."""

    def __post_init__(self) -> None:
        for key, low, high in (("min_images_per_class", 1, None), ("min_test_images", 1, None),
                               ("max_duplicate_share", 0, 1), ("max_test_in_train", 0, 1)):
            value = getattr(self, key)
            if value < low or (high is not None and value > high):
                raise InputError(f"policy inbox.{key} is {value!r}; allowed: {low} "
                                 + ("or more" if high is None else f"to {high}"))


@dataclasses.dataclass(frozen=True)
class Declaration:
    """The keys of `task.yaml`."""

    classes: tuple[str, ...] | None = None
    """All classes of the task: each must have images, and no other class may occur."""
    transform: str = "none"
    """Corruption of the task's images (as in --task-transforms)."""
    replaces: bool = False
    """Whether a part replaces the data of its task, and not adds to it; it may have other
    classes."""


@dataclasses.dataclass(frozen=True, eq=False)
class CheckedArrival:
    """A validated arrival, with its problems if it has any."""

    arrival: Arrival
    experience: Experience | None
    """None if the data could not be read at all."""
    hashes: HashArray
    """Hashes of its images, sorted."""
    problems: tuple[Problem, ...]


def check_arrival(storage: Storage, arrival: Arrival, config: DataConfig, policy: ArrivalPolicy,
                  earlier: Mapping[str, HashArray],
                  classes: Sequence[str] | None) -> CheckedArrival:
    """Validates everything in an arrival.

    earlier: hashes of the images of earlier slots, by slot. classes: the classes of the task that
    it refreshes; None for a new task. What replaces a task is checked as a new task is, and may
    have some of the task's images.
    """
    nothing, few = np.array([], np.uint64), list[Problem]()
    try:
        declared = _declaration(storage, arrival)
        if declared.replaces:
            classes = None
            earlier = {slot: hashes for slot, hashes in earlier.items()
                       if task_of(slot) != arrival.task}
        images = _read(storage, arrival, config, classes, declared)
        few = _few(images, policy, whole=classes is None)
        slot = f"{arrival.task}/={arrival.part}" if declared.replaces else arrival.slot
        experience = given_experience(slot, images, config, declared.transform, classes)
        tables = {split: _look(getattr(experience, split), config) for split in SPLITS}
    except (InputError, pa.ArrowException) as error:
        return CheckedArrival(arrival, None, nothing, tuple(few or [Problem("data", str(error))]))
    except OSError as error:
        _reraise_unless_damaged(storage, arrival, error)
        problem = Problem("data", f"cannot be read: {error}")
        return CheckedArrival(arrival, None, nothing, (problem,))
    problems = [Problem("image", text) for _, bad in tables.values() for text in bad]
    if config.on_bad_image == "skip":
        problems = []
    elif len(problems) > MAX_LISTED:
        more = len(problems) - MAX_LISTED
        problems = [*problems[:MAX_LISTED], Problem("image", f"and {more} more such images")]
    problems += few
    if len(experience.test) < policy.min_test_images:
        problems.append(Problem("few", f"the task has {counted(len(experience.test), 'test image')}"
                                       f"; allowed: {policy.min_test_images} or more"))
    hashes = np.sort(np.concatenate([hash_N for hash_N, _ in tables.values()]))
    problems += _duplicates(hashes, earlier, policy)
    leaked = np.isin(tables["test"][0], tables["train"][0]).mean()
    if leaked > policy.max_test_in_train:
        problems.append(Problem("duplicate", f"{leaked:.0%} of the test images are training "
                                f"images too; allowed: {policy.max_test_in_train:.0%}"))
    return CheckedArrival(arrival, experience, hashes, tuple(problems))


def write_hashes(storage: Storage, path: str, hashes: HashArray) -> None:
    """Stores the hashes of a task's images, unless the file exists: its name fixes its content."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"sha256_64": hashes}), sink)
    storage.put_if_absent(path, sink.getvalue())


def read_hashes(storage: Storage, path: str) -> HashArray:
    """Reads the file of `write_hashes`. Raises: IntegrityError if it cannot be read."""
    try:
        file = pq.ParquetFile(io.BytesIO(storage.read_bytes(path)))  # read_table imports for longer
        table = file.read(columns=["sha256_64"])
        hashes: HashArray = table.column(0).to_numpy().astype(np.uint64)
        return hashes
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"image hashes {path} cannot be read: {error}") from error


def _read(storage: Storage, arrival: Arrival, config: DataConfig,
          classes: Sequence[str] | None, declared: Declaration) -> ImageSet:
    """The arrival's images. Raises: InputError for classes or files that do not fit."""
    images = read_sets(arrival.folder, None, storage.filesystem, columns=columns_of(config),
                       arrivals_beside=True)
    if isinstance(images, dict):
        raise InputError(f"{arrival.folder} holds several data sets; allowed: one task, with "
                         "train/ and test/ or Parquet files of these names")
    if declared.classes is not None:
        unknown = sorted(set(images.classes) - set(declared.classes))
        missing = sorted(set(declared.classes) - set(images.classes))
        if unknown:
            raise InputError(f"label {unknown[0]!r} is not declared in {DECLARATION}; allowed: "
                             + ", ".join(declared.classes))
        if missing and classes is None:
            raise InputError(f"class {missing[0]!r} is declared in {DECLARATION} but has no "
                             "images; allowed: images of every class")
    if classes is None and len(images.classes) < 2:
        raise InputError(f"there is 1 class, {images.classes[0]!r}; allowed: 2 or more")
    return images


def _declaration(storage: Storage, arrival: Arrival) -> Declaration:
    path = f"{arrival.folder}/{DECLARATION}"
    if storage.stat(path) is None:
        return Declaration()
    try:
        content = storage.read_bytes(path, MAX_DECLARATION)
    except IntegrityError as error:
        raise InputError(f"{DECLARATION} cannot be read: {error}") from error
    values = read_yaml(content, DECLARATION) or {}
    if not isinstance(values, Mapping):
        raise InputError(f"{DECLARATION} holds {type(values).__name__}; allowed: the keys "
                         "classes, transform and replaces")
    declared: Declaration = build(Declaration, values, f"{DECLARATION}: ")
    parse(declared.transform)
    if declared.replaces and not arrival.part:
        raise InputError(f"replaces is given in the {DECLARATION} of the new task {arrival.task!r};"
                         f" allowed: in the folder of a part, inbox/{arrival.task}/NAME/, once the "
                         "task is learned")
    return declared


def _look(table: ImageTable, config: DataConfig) -> tuple[HashArray, list[str]]:
    """Hashes of the images in order, and a message for each image that cannot be decoded."""
    import hashlib

    ids = np.array(table.ids(), dtype=object)
    hash_N = np.zeros(len(table), np.uint64)
    bad: list[str] = []

    def decode(images: Sequence[bytes], names: Sequence[str]) -> list[str]:
        decoded = decode_images(images, names, config.input_size, on_bad="skip",
                                max_pixels=config.max_image_pixels)
        return [f"image {image.id} {image.reason}" for image in decoded.bad]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for position_n, images in table.chunks():
            hash_N[position_n] = [int.from_bytes(hashlib.sha256(image).digest()[:HASH_BYTES])
                                  for image in images]
            slices = [slice(start, start + 64) for start in range(0, len(images), 64)]
            for texts in pool.map(lambda rows, position_n=position_n, images=images: decode(
                    images[rows], ids[position_n[rows]].tolist()), slices):
                bad += texts
    return hash_N, bad


def _few(images: ImageSet, policy: ArrivalPolicy, *, whole: bool) -> list[Problem]:
    count_K = np.bincount(images.train.label_N, minlength=len(images.classes))
    return [Problem("few", f"class {name!r} has {counted(count, 'training image')}; allowed: "
                           f"{policy.min_images_per_class} or more")
            for name, count in zip(images.classes, count_K.tolist(), strict=True)
            if count < policy.min_images_per_class and (whole or count)]


def _duplicates(hashes: HashArray, earlier: Mapping[str, HashArray],
                policy: ArrivalPolicy) -> list[Problem]:
    if not earlier or not len(hashes):
        return []
    known = np.isin(np.concatenate(list(earlier.values())), hashes)  # one search for all tasks
    ends = np.cumsum([len(others) for others in earlier.values()])
    problems = []
    for (slot, others), found in zip(earlier.items(), np.split(known, ends[:-1]), strict=True):
        if not found.any():
            continue
        share = float(np.isin(hashes, others).mean())
        if share > policy.max_duplicate_share:
            problems.append(Problem("duplicate", f"{share:.0%} of its images are those of task "
                                    f"{slot!r}; allowed: {policy.max_duplicate_share:.0%}"))
    return problems


def _reraise_unless_damaged(storage: Storage, arrival: Arrival, error: Any) -> None:
    """Raises the error again if a file's bytes cannot be read, which is no fault of the data."""
    for entry in arrival.files:
        try:
            with storage.filesystem.open_input_file(entry.path) as source:
                while source.read(1 << 24):
                    pass
        except OSError:
            raise error from None
