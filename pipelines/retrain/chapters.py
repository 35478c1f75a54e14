"""Chapters: what a pass needs of learned tasks, 64 tasks in one file.

    <root>/streams/<stream>/chapters/<lineage id of the chapter's last task>.json

A pass needs little of each task that is learned: its records, the manifests of its features and the
hashes of its images. These lie in four or five small files for each task, and each task's records
hold an accuracy for every task before it. A chapter has the same content in one file, and of an
accuracy row only what differs from the row before.

A chapter is a copy. It names every file that it was made of, with size and time of change, and it
begins with a hash of the rest. Where one of these files is not as it was, or the chapter is
damaged, the pass reads the files themselves and writes the chapter again. So chapters may be
deleted at any time.
"""

import base64
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow.fs as pafs

from partialhn.checkpoints import FIELDS
from partialhn.features.manifest import FeatureRecipe, manifest_of
from partialhn.naming import digest_text
from partialhn.training.lineage import Learned
from partialhn.training.records import EpochRecord, TaskRecord, fields_of
from partialhn.training.slots import Slot
from pipelines.platform.storage import Storage
from pipelines.retrain.journal import Decided
from pipelines.retrain.seen import READERS, Seen, hashes_path

FORMAT = 1
TASKS = 64
"""Tasks of a chapter. The tasks after the last whole chapter are read one by one."""
GONE = (-1, -1)
Row = tuple[float, ...]
"""The accuracies of a record."""


class Chapters:
    """The chapters of one stream."""

    def __init__(self, storage: Storage, stream: str) -> None:
        self._storage, self._stream = storage, stream

    def recall(self, base: Sequence[Decided], seen: Seen) -> None:
        """Adds to `seen` what the chapters hold of the tasks of a model."""
        spans = [tasks for tasks in _spans(base) if tasks[-1].prefix not in seen.learned]
        with ThreadPoolExecutor(READERS) as pool:
            texts = pool.map(lambda tasks: self._text(tasks[-1].prefix), spans)
            found = [(tasks, chapter) for tasks, text in zip(spans, texts, strict=True)
                     if (chapter := _parse(text, tasks)) is not None]
        states = self._states([path for _, chapter in found for path in chapter["files"]])
        for tasks, chapter in found:
            if all(states[path] == tuple(state) for path, state in chapter["files"].items()):
                _recall(chapter, tasks, seen)
                seen.chapters.add(tasks[-1].prefix)

    def write(self, base: Sequence[Decided], seen: Seen) -> None:
        """Writes the chapters that are missing, from what the pass has read of their tasks."""
        for tasks in _spans(base):
            if tasks[-1].prefix in seen.chapters or not all(_is_read(task, seen)
                                                            for task in tasks):
                continue
            wanted = dict(pair for task in tasks for pair in self._files(task, seen))
            states = self._states(list(wanted))
            if any((states[path] != GONE) != is_stored for path, is_stored in wanted.items()):
                continue  # features were pruned or computed while the pass ran
            self._storage.write_text(self._path(tasks[-1].prefix), _sealed(json.dumps(
                {"format": FORMAT, "files": states, **_content(tasks, seen)})))
            seen.chapters.add(tasks[-1].prefix)

    def _path(self, lineage_id: str) -> str:
        return self._storage.path("streams", self._stream, "chapters", f"{lineage_id}.json")

    def _text(self, lineage_id: str) -> str:
        """A stored chapter; empty where there is none, or one that is no text."""
        try:
            return self._storage.read_text(self._path(lineage_id))
        except (FileNotFoundError, UnicodeDecodeError):
            return ""

    def _files(self, task: Decided, seen: Seen) -> Iterator[tuple[str, bool]]:
        """The files, as paths below the storage's root, that hold what a chapter has of a task, and
        whether the pass has found each of them.
        """
        yield f"runs/{self._stream}/learned/{task.prefix}/{FIELDS}", True
        for split, recipe in task.recipes.items():
            yield (f"features/{FeatureRecipe(**recipe).key}/manifest.json",
                   split in seen.slots[task.prefix].manifests)
        if task.fingerprint:
            yield hashes_path(self._stream, task.fingerprint), True

    def _states(self, paths: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Size and time of change in nanoseconds of files; `GONE` for those that do not exist."""
        infos = self._storage.filesystem.get_file_info(
            [self._storage.path(path) for path in paths])
        return {path: GONE if info.type == pafs.FileType.NotFound
                else (int(info.size or 0), int(info.mtime_ns or 0))
                for path, info in zip(paths, infos, strict=True)}


def _spans(base: Sequence[Decided]) -> list[Sequence[Decided]]:
    """The tasks of each whole chapter."""
    return [base[end - TASKS:end] for end in range(TASKS, len(base) + 1, TASKS)]


def _is_read(task: Decided, seen: Seen) -> bool:
    return (task.prefix in seen.learned and task.prefix in seen.slots
            and (not task.fingerprint or task.fingerprint in seen.hashes))


def _content(tasks: Sequence[Decided], seen: Seen) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    before: Row = ()
    for task in tasks:
        learned = seen.learned[task.prefix]
        record, row = fields_of(learned.record), learned.record.accuracy_row
        record["accuracy_row"] = _shortened(row, before)
        hashes_N = seen.hashes.get(task.fingerprint)
        entries.append({
            "prefix": learned.prefix, "parent": learned.parent, "record": record,
            "task_bytes": learned.task_bytes,
            "epochs": [list(fields_of(epoch).values()) for epoch in learned.epochs],
            "manifests": {split: dataclasses.asdict(manifest) for split, manifest
                          in seen.slots[task.prefix].manifests.items()},
            "hashes": None if hashes_N is None else base64.b64encode(
                hashes_N.astype("<u8").tobytes()).decode()})
        before = row
    return {"epoch_fields": [field.name for field in dataclasses.fields(EpochRecord)],
            "tasks": entries}


def _shortened(row: Row, before: Row) -> dict[str, Any]:
    """A row as the accuracies that differ from those of the row before."""
    same = min(len(before), len(row))
    return {"changed": {place: row[place] for place in range(same) if row[place] != before[place]},
            "new": row[same:], "tasks": len(row)}


def _whole(short: Mapping[str, Any], before: Row) -> Row:
    """The row that `_shortened` was given."""
    row = [*before[:short["tasks"]], *short["new"]]
    for place, accuracy in short["changed"].items():
        row[int(place)] = accuracy
    if len(row) != short["tasks"]:
        raise ValueError(f"the row has {len(row)} accuracies; expected {short['tasks']}")
    return tuple(row)


def _sealed(content: str) -> str:
    """The text of a chapter: its content, as JSON, behind a hash of it."""
    return f'{{"sha256": "{digest_text(content)}", "chapter": {content}}}'


def _parse(text: str, tasks: Sequence[Decided]) -> dict[str, Any] | None:
    """The content of a chapter of these tasks; None where there is none, or one that is damaged,
    of other tasks or of another release.
    """
    content = text.partition('"chapter": ')[2][:-1]
    if text != _sealed(content):
        return None
    chapter: dict[str, Any] = json.loads(content)
    known = chapter["format"] == FORMAT and [entry["prefix"] for entry in chapter["tasks"]]
    return chapter if known == [task.prefix for task in tasks] else None


def _recall(chapter: Mapping[str, Any], tasks: Sequence[Decided], seen: Seen) -> None:
    names, before = chapter["epoch_fields"], Row()
    for task, entry in zip(tasks, chapter["tasks"], strict=True):
        before = _whole(entry["record"]["accuracy_row"], before)
        epochs = tuple(EpochRecord(**dict(zip(names, values, strict=True)))
                       for values in entry["epochs"])
        seen.learned[task.prefix] = Learned(
            entry["prefix"], entry["parent"],
            TaskRecord.from_fields(entry["record"] | {"accuracy_row": before}), epochs,
            entry["task_bytes"])
        seen.slots[task.prefix] = Slot(
            task.slot, task.classes, task.fingerprint, task.transform,
            {split: manifest_of(fields) for split, fields in entry["manifests"].items()})
        if entry["hashes"] is not None:
            seen.hashes[task.fingerprint] = np.frombuffer(
                base64.b64decode(entry["hashes"]), "<u8").astype(np.uint64)
