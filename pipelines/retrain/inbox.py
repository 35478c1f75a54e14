"""Where tasks arrive: <root>/inbox/<task>/, and more data of a task in <root>/inbox/<task>/<part>/.

A folder holds a data set in the forms of the main job ({train,test}/<class>/<image>, or Parquet)
and, written last, the marker `_READY`. Beside it may lie `task.yaml`, which declares the classes.
An arrival that cannot be used stays where it is and gets a `_REJECTED.json` that says why; it is
looked at again once its files change.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from partialhn.data.layout import SPLIT_NAMES
from partialhn.naming import digest
from pipelines.platform.local_files import StoredFile
from pipelines.platform.storage import Storage

READY, REJECTED, DECLARATION = "_READY", "_REJECTED.json", "task.yaml"
_MARKERS = (READY, REJECTED)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
NAME_RULE = "letters, digits, _ . and -, a letter or digit first, at most 100 characters"
MAX_FILES = 5_000_000


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A folder in the inbox that is ready to be looked at."""

    task: str
    part: str
    """Empty for a new task; the sub-folder for more data of one that is there."""
    folder: str
    """Path in the storage's filesystem."""
    ready_at: float
    """When it became ready, in seconds since 1970 by the storage's clock."""
    files: tuple[StoredFile, ...]

    @property
    def slot(self) -> str:
        """The slot it is learned in."""
        return f"{self.task}/{self.part}" if self.part else self.task

    @property
    def signature(self) -> str:
        """Changes whenever a file of the arrival does; its markers do not count."""
        listed = sorted((entry.path[len(self.folder):], entry.size, entry.etag)
                        for entry in self.files)
        return digest(listed, 32)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One reason why an arrival is rejected."""

    code: str
    """For machines: name, path, data, class, image, few, duplicate, label."""
    text: str


class Inbox:
    """The inbox of a storage; nothing in it is moved or deleted but our own `_REJECTED.json`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.folder = storage.path("inbox")

    def scan(self, learned: Callable[[str], bool],
             quiet_minutes: float | None = None) -> tuple[list[Arrival], list[str]]:
        """The arrivals that are ready, by the time they became so and by name; and what waits.

        learned: whether a slot is learned: its folder is not listed any more. quiet_minutes:
        without a marker, ready is what has not changed for so long.
        """
        now = self._storage.now()
        arrivals, waiting = [], []
        for task in self._storage.folders(self.folder):
            folder = f"{self.folder}/{task}"
            parts = [name for name in self._storage.folders(folder)
                     if name.lower() not in SPLIT_NAMES and not name.startswith((".", "_"))]
            places = [("", folder)] + [(part, f"{folder}/{part}") for part in parts]
            for part, place in places:
                if learned(f"{task}/{part}" if part else task):
                    continue
                found = self._look(task, part, place, now, quiet_minutes)
                if isinstance(found, Arrival):
                    arrivals.append(found)
                elif found:
                    waiting.append(found)
        return sorted(arrivals, key=_order), waiting

    def _look(self, task: str, part: str, folder: str, now: float,
              quiet_minutes: float | None) -> Arrival | str:
        """An arrival, or what is missing for one; empty where the folder is none."""
        marker = self._storage.stat(f"{folder}/{READY}")
        if marker is None and quiet_minutes is None:
            # a sub-folder without a marker is a class, or data that belongs to its task
            return "" if part else f"{task}: no {READY} marker"
        files = [entry for entry in self._storage.list(folder)
                 if _is_data(entry.path[len(folder) + 1:], part)]
        if marker is None:
            assert quiet_minutes is not None
            if not files or not _is_data_set(folder, files):
                return ""
            newest = max(entry.modified for entry in files)
            if now - newest < 60 * quiet_minutes:
                return f"{f'{task}/{part}' if part else task}: changed {now - newest:.0f} s ago"
            return Arrival(task, part, folder, newest, tuple(files))
        if not part and not files and self._storage.folders(folder):
            return ""  # only newer parts of the task are still there
        return Arrival(task, part, folder, marker.modified, tuple(files))

    def rejected(self, arrival: Arrival, policy: str) -> dict[str, Any] | None:
        """What was written when these very files were rejected under this policy, or None."""
        try:
            found = json.loads(self._storage.read_text(f"{arrival.folder}/{REJECTED}"))
        except (FileNotFoundError, ValueError):
            return None
        same = (isinstance(found, dict) and found.get("signature") == arrival.signature
                and found.get("policy") == policy)
        return found if same else None

    def reject(self, arrival: Arrival, policy: str, problems: Sequence[Problem]) -> None:
        """Writes why an arrival is not learned, beside its data."""
        fields = {"task": arrival.slot, "rejected": True,
                  "reasons": [problem.text for problem in problems],
                  "codes": [problem.code for problem in problems],
                  "what_to_do": "mend the data and write the folder's _READY anew; it is looked "
                                "at again when a file changes",
                  "signature": arrival.signature, "policy": policy,
                  "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self._storage.write_text(f"{arrival.folder}/{REJECTED}", json.dumps(fields, indent=1))

    def accept(self, arrival: Arrival) -> None:
        """Takes an older rejection away."""
        self._storage.delete(f"{arrival.folder}/{REJECTED}")

    def name_problems(self, arrival: Arrival, others: Sequence[str]) -> list[Problem]:
        """What is wrong with names and paths, before anything of the data is read.

        others: tasks that are learned or came before it.
        """
        problems = [Problem("name", f"{what} name is {name!r}; allowed: {NAME_RULE}")
                    for what, name in (("task", arrival.task), ("part", arrival.part))
                    if (name or what == "task") and not _NAME.fullmatch(name)]
        for other in dict.fromkeys(others):
            if other != arrival.task and other.casefold() == arrival.task.casefold():
                problems.append(Problem("name", f"task {arrival.task!r} and task {other!r} differ "
                                                "in case only; allowed: another name"))
        problems += [Problem("path", f"{path!r} leaves its folder or is no plain name")
                     for path in (entry.path[len(arrival.folder) + 1:] for entry in arrival.files)
                     if not _is_plain(path)][:5]
        if self._storage.is_local:
            problems += [Problem("path", f"{link!r} is a link to {target!r}, outside of the "
                                         "task's folder; allowed: files of its own")
                         for link, target in _links_out(arrival.folder)][:5]
        return problems


def _order(arrival: Arrival) -> tuple[Any, ...]:
    natural = [(int(piece), piece) if piece.isdigit() else (0, piece)
               for piece in re.split(r"(\d+)", arrival.slot)]
    return arrival.ready_at, natural


def _is_data(path: str, part: str) -> bool:
    """Whether a file counts for an arrival: not our markers, nor other arrivals below it."""
    top, slash, _ = path.partition("/")
    if path in _MARKERS:
        return False
    return bool(part) or not slash or top.lower() in SPLIT_NAMES


def _is_data_set(folder: str, files: Sequence[StoredFile]) -> bool:
    """Whether there is a part or a Parquet file: without a marker, what else would say so?"""
    tops = [entry.path[len(folder) + 1:].partition("/") for entry in files]
    return any((slash and top.lower() in SPLIT_NAMES) or top.lower().endswith(".parquet")
               for top, slash, _ in tops)


def _is_plain(path: str) -> bool:
    """Whether a path stays below its folder, whatever reads it."""
    return ("\\" not in path and all(ord(letter) >= 32 and ord(letter) != 127 for letter in path)
            and all(step not in ("", ".", "..") for step in path.split("/")))


def _links_out(folder: str) -> list[tuple[str, str]]:
    """Symbolic links that lead out of a folder, the folder itself included."""
    root = Path(folder)
    home = root.parent.resolve() / root.name
    links = [root] if root.is_symlink() else []
    for place, folders, files in os.walk(folder):
        links += [path for name in folders + files if (path := Path(place) / name).is_symlink()]
    return [(str(link), str(link.resolve())) for link in links
            if link == root or not link.resolve().is_relative_to(home)]
