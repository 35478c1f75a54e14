"""The inbox: new tasks in <root>/inbox/<task>/, more data of a task in <root>/inbox/<task>/<part>/.

A folder holds a data set in a format that `train` accepts ({train,test}/<class>/<image>, or
Parquet), optionally a `task.yaml` that declares the classes, or that a part replaces its task's
data, and the marker `_READY`, which is written last. An arrival that cannot be used
stays in place and gets a `_REJECTED.json` with the reasons; it is checked again when its files
or its name change.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from partialhn.data.listing import (
    image_paths,
    is_junk,
    is_left_by_file_system,
    is_metadata,
    split_of_folder,
)
from partialhn.naming import digest
from pipelines.platform.local_files import StoredFile
from pipelines.platform.storage import Storage

READY, REJECTED, DECLARATION = "_READY", "_REJECTED.json", "task.yaml"
PROPOSED = "_PROPOSED.json"
"""The note of a folder that `drift --propose` has opened (`pipelines.retrain.proposal`)."""
CORRECT = ("correct the data, or the folder's name, and write the folder's _READY again; the "
           "folder is checked again when its name or a file changes")
TRAIN_OTHERWISE = ("give --config other options of training, such as a smaller learning_rate; the "
                   "task is learned again when they, the policy or a file change")
_MARKERS = (READY, REJECTED, PROPOSED)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
NAME_RULE = "letters, digits, _ . and -, a letter or digit first, at most 100 characters"


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A folder in the inbox that is ready to be checked and learned."""

    task: str
    part: str
    """Name of the sub-folder with more data of a known task; empty for a new task."""
    folder: str
    """Path in the storage's filesystem."""
    ready_at: float
    """Time when it became ready, in seconds since 1970 by the storage's clock."""
    files: tuple[StoredFile, ...]

    @property
    def slot(self) -> str:
        """Name of the slot in which it is learned."""
        return f"{self.task}/{self.part}" if self.part else self.task

    @property
    def signature(self) -> str:
        """A hash that changes with every file of the arrival; its markers do not count."""
        listed = sorted((file.path[len(self.folder):], file.size, file.etag)
                        for file in self.files)
        return digest(listed, 32)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One reason why an arrival is rejected."""

    code: str
    """Code for programs: name, path, data, class, image, few, duplicate, label or diverged."""
    text: str


@dataclasses.dataclass(frozen=True)
class Contents:
    """Everything that lies in the inbox."""

    arrivals: list[Arrival]
    """Those that are ready, by time and name."""
    waiting: list[str]
    """Folders that are not ready yet, and files outside of them, each with the reason."""
    not_used: list[str]
    """Learned folders whose files are not those that were learned, with what to do."""


class _Listing:
    """The files of an inbox. On S3 all are listed at once: a long stream has many learned folders,
    and a request for each of them takes longer.
    """

    def __init__(self, storage: Storage, inbox: str) -> None:
        self._storage, self._inbox = storage, inbox
        self._by_task: dict[str, list[StoredFile]] | None = None

    def files(self, folder: str) -> list[StoredFile]:
        """Every file below a folder of the inbox."""
        if self._storage.is_local:
            return list(self._storage.list(folder))
        if self._by_task is None:
            self._by_task = {}
            for file in self._storage.list(self._inbox):
                task = file.path[len(self._inbox) + 1:].partition("/")[0]
                self._by_task.setdefault(task, []).append(file)
        return [file for file in self._by_task.get(folder[len(self._inbox) + 1:].partition("/")[0],
                                                   ()) if file.path.startswith(f"{folder}/")]

    def folders(self, folder: str) -> tuple[str, ...]:
        """Names of the folders directly below a folder of the inbox."""
        if self._storage.is_local:
            return self._storage.folders(folder)
        below = (file.path[len(folder) + 1:].partition("/") for file in self.files(folder))
        return tuple(sorted({name for name, slash, _ in below if slash}))


class Inbox:
    """The inbox of a storage; only our own `_REJECTED.json` files in it are written or deleted."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.folder = storage.path("inbox")
        self._listing = _Listing(storage, self.folder)

    def scan(self, learned: Mapping[str, str], quiet_minutes: float | None = None) -> Contents:
        """Everything that lies in the inbox.

        learned: the signatures of the arrivals that are learned already, by slot. quiet_minutes: a
        folder without a marker is ready if it has not changed for so long.
        """
        now, self._listing = self._storage.now(), _Listing(self._storage, self.folder)
        arrivals, not_used = list[Arrival](), list[str]()
        waiting = self._misplaced()
        for task in self._storage.folders(self.folder):
            if is_left_by_file_system(task):
                continue
            folder = f"{self.folder}/{task}"
            parts = [name for name in self._listing.folders(folder)
                     if split_of_folder(name) is None and not is_junk(name)
                     and not name.startswith("_")]
            candidates = [(task, "", folder)] + [
                (f"{task}/{part}", part, f"{folder}/{part}") for part in parts]
            left: list[str] = []
            before = len(arrivals) + len(waiting)
            for slot, part, candidate in candidates:
                if slot in learned:
                    if self._differs(task, part, candidate, learned[slot]):
                        not_used.append(_not_used(task, slot, learned[slot]))
                    continue
                arrival = self._look(task, part, candidate, now, quiet_minutes)
                if isinstance(arrival, Arrival):
                    arrivals.append(arrival)
                elif arrival:
                    waiting.append(arrival)
                elif part and any(image_paths([file.path]) for file in _data(
                        self._listing.files(candidate), candidate, part)):
                    left.append(part)
            if left and (task in learned or self._storage.exists(f"{folder}/{READY}")):
                waiting.append(f"{task}: the images in its folders {', '.join(left[:5])} belong to "
                               f"no arrival; allowed: {task}/train/<class>/<image>, or "
                               f"{task}/NAME/train/<class>/<image> with {READY} in NAME")
            elif (len(arrivals) + len(waiting) == before
                  and not any(slot in learned for slot, _, _ in candidates)
                  and self._storage.exists(f"{folder}/{READY}")):
                waiting.append(f"{task}: has {READY}, but its folders hold no images")
        return Contents(sorted(arrivals, key=_order), waiting, not_used)

    def _misplaced(self) -> list[str]:
        """Files beside the tasks' folders, and an inbox that does not exist."""
        if not self._storage.exists(self.folder):
            return [f"nothing can arrive, because {self.folder} does not exist"]
        return [f"{name}: is a file; allowed: a folder for each task"
                for name in self._storage.files(self.folder)
                if not is_junk(name) and not name.startswith("_")]

    def _differs(self, task: str, part: str, folder: str, signature: str) -> bool:
        """Whether a learned folder holds other files than those that were learned.

        Files may be deleted once they are learned: an empty folder does not differ.
        """
        files = _data(self._listing.files(folder), folder, part)
        return bool(files) and Arrival(task, part, folder, 0, files).signature != signature

    def _look(self, task: str, part: str, folder: str, now: float,
              quiet_minutes: float | None) -> Arrival | str:
        """The arrival in a folder, or the reason why it is not ready; empty if it is no arrival."""
        marker = self._storage.stat(f"{folder}/{READY}")  # before its files are listed
        name = f"{task}/{part}" if part else task
        listed = list(self._storage.list(folder))
        files = _data(listed, folder, part)
        if marker is None and not files and self._storage.exists(f"{folder}/{PROPOSED}"):
            return (f"{name}: is proposed by `partialhn drift`, because a new task seems to be "
                    f"here; its {PROPOSED} says what to do")
        if marker is None and quiet_minutes is None and not part:
            return f"{name}: has no {READY} marker yet"
        if marker is None:
            if not files or not _is_data_set(folder, files):
                return ""  # the folder of a class, or of anything else but a data set
            if quiet_minutes is None:
                return f"{name}: has no {READY} marker yet"
            # hidden files too: a copying program writes to one and renames it at the end
            newest = max(file.arrived for file in listed
                         if file.path.rpartition("/")[2] not in _MARKERS)
            if now - newest < 60 * quiet_minutes:
                return f"{name}: changed {now - newest:.0f} s ago"
            return Arrival(task, part, folder, newest, files)
        if not part and not files and self._storage.folders(folder):
            return ""  # the folder only contains further parts of the task
        return Arrival(task, part, folder, marker.modified, files)

    def rejected(self, arrival: Arrival, policy: str, training: str) -> dict[str, Any] | None:
        """The content of `_REJECTED.json` if it concerns this very slot, these files, this policy,
        and these options of training if its training diverged.

        It travels with a folder that is renamed, as a rejection of its name asks.
        """
        try:
            rejection = json.loads(self._storage.read_text(f"{arrival.folder}/{REJECTED}"))
        except (FileNotFoundError, ValueError):
            return None
        same = isinstance(rejection, dict) and [
            rejection.get(key) for key in ("task", "signature", "policy")] == [
            arrival.slot, arrival.signature, policy] and (
            rejection.get("training", training) == training)
        return rejection if same else None

    def reject(self, arrival: Arrival, policy: str, problems: Sequence[Problem],
               training: str | None = None) -> None:
        """Writes the reasons for a rejection beside the arrival's data.

        training: hash of the options with which its training diverged; None if its data is at
        fault.
        """
        fields = {"task": arrival.slot, "rejected": True,
                  "reasons": [problem.text for problem in problems],
                  "codes": [problem.code for problem in problems],
                  "what_to_do": CORRECT if training is None else TRAIN_OTHERWISE,
                  "signature": arrival.signature, "policy": policy,
                  **({} if training is None else {"training": training}),
                  "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self._storage.write_text(f"{arrival.folder}/{REJECTED}", json.dumps(fields, indent=1))

    def accept(self, arrival: Arrival) -> None:
        """Deletes an older rejection."""
        self._storage.delete(f"{arrival.folder}/{REJECTED}")

    def name_problems(self, arrival: Arrival, others: Sequence[str]) -> list[Problem]:
        """Problems with names and paths, which are checked before any data is read.

        others: names of tasks that are learned or arrived earlier.
        """
        problems = [Problem("name", f"{what} name is {name!r}; allowed: {NAME_RULE}")
                    for what, name in (("task", arrival.task), ("part", arrival.part))
                    if (name or what == "task") and not _NAME.fullmatch(name)]
        for other in dict.fromkeys(others):
            if other != arrival.task and other.casefold() == arrival.task.casefold():
                problems.append(Problem("name", f"task {arrival.task!r} and task {other!r} differ "
                                                "in case only; allowed: another name"))
        problems += [Problem("path", f"path {path!r} leaves its folder or is no plain name; "
                                     "allowed: plain names below the task's folder")
                     for path in (file.path[len(arrival.folder) + 1:] for file in arrival.files)
                     if not _is_plain(path)][:5]
        if self._storage.is_local:
            problems += [Problem("path", f"{link!r} is a link to {target!r}, outside of the "
                                         "task's folder; allowed: files of its own")
                         for link, target in _links_out(arrival.folder)][:5]
        return problems


def _not_used(task: str, slot: str, signature: str) -> str:
    why = ("its files are not those that were learned (changed, added or sent again)" if signature
           else "`partialhn train` has learned this task")
    return (f"{slot}: {why}, so what lies there is not used; more data of the task goes to "
            f"inbox/{task}/NAME/, and with `replaces: true` in its {DECLARATION} it replaces what "
            "was learned")


def _order(arrival: Arrival) -> tuple[Any, ...]:
    natural = [(int(piece), piece) if piece.isdigit() else (0, piece)
               for piece in re.split(r"(\d+)", arrival.slot)]
    return arrival.ready_at, natural


def _data(files: Iterable[StoredFile], folder: str, part: str) -> tuple[StoredFile, ...]:
    """Those of the files in a folder that belong to its arrival."""
    return tuple(file for file in files if _is_data(file.path[len(folder) + 1:], part))


def _is_data(path: str, part: str) -> bool:
    """Whether a file belongs to an arrival: no marker of ours, no other arrival below it."""
    top, slash, _ = path.partition("/")
    if path in _MARKERS or is_junk(path):
        return False
    return bool(part) or not slash or split_of_folder(top) is not None


def _is_data_set(folder: str, files: Sequence[StoredFile]) -> bool:
    """Whether a folder without a marker looks like a data set: has a split, a Parquet file, or a
    table beside images.
    """
    tops = [file.path[len(folder) + 1:].partition("/") for file in files]
    return any((slash and split_of_folder(top)) or top.lower().endswith(".parquet")
               or (not slash and is_metadata(top)) for top, slash, _ in tops)


def _is_plain(path: str) -> bool:
    """Whether a path stays below its folder, on every system that may read it."""
    return ("\\" not in path and all(ord(letter) >= 32 and ord(letter) != 127 for letter in path)
            and all(step not in ("", ".", "..") for step in path.split("/")))


def _links_out(folder: str) -> list[tuple[str, str]]:
    """Symbolic links that lead out of a folder, the folder itself included."""
    root = Path(folder)
    home = root.parent.resolve() / root.name
    links = [root] if root.is_symlink() else []
    for below, folders, files in os.walk(folder):
        links += [path for name in folders + files if (path := Path(below) / name).is_symlink()]
    return [(str(link), str(link.resolve())) for link in links
            if link == root or not link.resolve().is_relative_to(home)]
