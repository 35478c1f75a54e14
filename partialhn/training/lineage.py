"""The lineage of a model: its configuration and the tasks so far determine it.

    <folder>/<lineage_id>/model.json    the model after a task
    <folder>/objects/                   tensors that models share (`partialhn.checkpoints.shared`)

A lineage id is a hash of the lineage id before it, the options that the task is learned with, and
the task's data. It is stored as `prefix` in model files, registry tags and logs.
So a run reuses the tasks that an earlier run learned, however many tasks have arrived since, and
learns only the new ones. The images and features of the earlier tasks may be deleted.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from torch import Tensor

from partialhn.checkpoints import checkpoint, shared
from partialhn.checkpoints.model import Model
from partialhn.config import Config
from partialhn.data.experience import Experience, task_of
from partialhn.errors import IntegrityError
from partialhn.folders import folder_entries
from partialhn.naming import digest, named_sections
from partialhn.strategies.table import OWN
from partialhn.training.records import EpochRecord, TaskRecord, fields_of
from partialhn.training.result import Outcome
from partialhn.training.slots import Slot

FORMAT = 1
FORGOTTEN = "forgotten"
"""Key of a model's facts: the fields of `Forgotten` for each task that it has forgotten."""
READERS = 16
"""Learned models whose fields are read at once."""
MOST_READ = 32
"""Learned models of a stream that are read to find out what it was begun with."""
BASELINE_OPTIONS = tuple(option for line in OWN.values() for option in line.options)
"""Options of the baselines, which do not change what the hypernetwork learns."""


@dataclasses.dataclass(frozen=True)
class Learned:
    """The records of a finished task."""

    prefix: str
    parent: str
    """The lineage id before it; empty for the first task."""
    record: TaskRecord
    epochs: tuple[EpochRecord, ...]
    task_bytes: int
    """Bytes that the task added to the checkpoint."""

    @staticmethod
    def of(outcome: Outcome, lineage_ids: Sequence[str], index: int) -> "Learned":
        """The records of one task of an outcome."""
        return Learned(lineage_ids[index], lineage_ids[index - 1] if index else "",
                       outcome.finished[index],
                       tuple(each for each in outcome.epochs if each.task_index == index),
                       outcome.task_bytes[index])


def lineage_ids_of(config: Config, network: str, slots: Sequence[Slot | Experience],
                   known: Sequence[str] = ()) -> tuple[str, ...]:
    """The lineage id after each slot. The first ids may be `known`: learned with other settings.

    network: fingerprint of the network that the trunk is cut from. The id does not depend on the
    baselines, on the hardware, on the compression of features, or on how the data was split into
    tasks; it depends on the data itself.
    """
    settings = {"format": FORMAT, "network": network, **settings_of(config)}
    ids = list(known)
    for slot in slots[len(ids):]:
        parent = ids[-1] if ids else ""
        ids.append(digest([parent, settings, slot.name, slot.fingerprint], 32))
    return tuple(ids)


def settings_of(config: Config) -> dict[str, dict[str, Any]]:
    """The options, by section, that a lineage id depends on beside the network and the data."""
    values = named_sections(dataclasses.replace(config, train=config.train.alone()))
    del values["train"]["compare"], values["features"]["compression"]
    if config.train.strategy == "partial_hn":
        for key in BASELINE_OPTIONS:
            del values["train"][key]
    data = {key: values["data"][key] for key in ("input_size", "on_bad_image", "stream_seed",
                                                 "max_image_pixels")}
    backbone = {key: values["backbone"][key] for key in ("backbone", "freeze_depth")}
    return {"data": data, "backbone": backbone,
            **{section: values[section] for section in ("features", "hypernet", "train")}}


def as_begun(config: Config, filesystem: pafs.FileSystem, folder: str) -> Config:
    """The configuration with which the stream in `folder` goes on.

    Some defaults of version 0.1.0 are chosen for each task today (`Config.with_first_values`). A
    stream that was begun with the old ones goes on with them, so that its learned tasks are found.
    """
    first = config.with_first_values()
    if first == config:
        return config
    learned = folder_entries(filesystem, folder)
    for entry in sorted(learned, key=lambda info: info.path)[:MOST_READ]:
        fields = checkpoint.read_fields(filesystem, entry.path)
        if fields is None:
            continue
        stored = Config.from_dict(fields["config"])
        for candidate in (config, first):
            if (settings_of(stored), stored.backbone.trunk_epochs) == (
                    settings_of(candidate), candidate.backbone.trunk_epochs):
                return candidate
    return config


def keep(model: Model, learned: Learned, filesystem: pafs.FileSystem, folder: str) -> int:
    """Stores the model after a task, with the task's records in the model's facts.

    Returns the bytes that it needs, with those that it shares.
    """
    fields = dataclasses.asdict(learned)
    model.facts |= {"chain": fields} | _still_forgotten(model, learned, filesystem, folder)
    head = {"format": checkpoint.FORMAT, "kind": "model"}
    return shared.upload(model.tensors(), head | model.fields(), filesystem, folder,
                         learned.prefix, learned.parent)


def _still_forgotten(model: Model, learned: Learned, filesystem: pafs.FileSystem,
                     folder: str) -> dict[str, Any]:
    """The tasks that the model before had forgotten, but for those that are learned again."""
    if FORGOTTEN in model.facts or not learned.parent:
        return {}
    before = checkpoint.read_fields(filesystem, f"{folder}/{learned.parent}") or {}
    tasks = {task_of(task.name) for task in model.tasks}
    gone = [fields for fields in before.get("facts", {}).get(FORGOTTEN, ())
            if fields["task"] not in tasks]
    return {FORGOTTEN: gone} if gone else {}


def find(filesystem: pafs.FileSystem, folder: str, lineage_ids: Sequence[str],
         known: dict[str, Learned] | None = None) -> list[Learned]:
    """The learned tasks, from the first up to the first that is not stored.

    known: what was found before in this folder; it is not read again, and what is found is added.
    """
    known = {} if known is None else known
    unread = [lineage_id for lineage_id in lineage_ids if lineage_id not in known]
    with ThreadPoolExecutor(READERS) as pool:  # a remote storage answers many at once
        stored = pool.map(lambda lineage_id: checkpoint.read_fields(
            filesystem, f"{folder}/{lineage_id}"), unread)
        for lineage_id, fields in zip(unread, stored, strict=True):
            if fields is not None:
                known[lineage_id] = _parse(fields, lineage_id)
    return [known[lineage_id] for lineage_id in itertools.takewhile(known.__contains__,
                                                                    lineage_ids)]


def outcome_of(learned: Sequence[Learned]) -> Outcome:
    """The outcome of the tasks so far, as if one run had learned them all."""
    return Outcome(tuple(epoch for each in learned for epoch in each.epochs),
                   tuple(each.record for each in learned),
                   tuple(each.task_bytes for each in learned))


def fetch_model(filesystem: pafs.FileSystem, folder: str, lineage_id: str, target: Path, *,
                shared_apart: bool = False) -> Path:
    """A local copy of the model after a task. Raises: IntegrityError if it is not stored.

    shared_apart: without the tensors that it shares with other models.
    """
    fields = checkpoint.read_fields(filesystem, f"{folder}/{lineage_id}")
    if fields is None or not checkpoint.fetch(filesystem, f"{folder}/{lineage_id}", target,
                                              fields_alone=shared.PARTS in fields):
        raise IntegrityError(f"the learned model {lineage_id} is not at {folder}/{lineage_id}")
    if not shared_apart:
        shared.complete(target, shared.reader(filesystem, folder))
    return target


def load_model(filesystem: pafs.FileSystem, folder: str, lineage_id: str) -> Model:
    """The model after a task. Raises: IntegrityError if it is not stored, or damaged."""
    with tempfile.TemporaryDirectory() as scratch:
        return Model.load(fetch_model(filesystem, folder, lineage_id, Path(scratch) / "model"))


def state(filesystem: pafs.FileSystem, folder: str,
          learned: Sequence[Learned]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state from which `Learner.restore` goes on after the learned tasks."""
    newest = learned[-1].prefix
    fields = checkpoint.read_fields(filesystem, f"{folder}/{newest}") or {}
    if shared.PARTS in fields:
        tensors = shared.tensors_of(fields, shared.reader(filesystem, folder))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            copy = fetch_model(filesystem, folder, newest, Path(scratch) / "model")
            tensors, fields = checkpoint.load(copy, "model")
    outcome = outcome_of(learned)
    return tensors, {"classes": [len(task["classes"]) for task in fields["tasks"]],
                     "epochs": list(map(fields_of, outcome.epochs)),
                     "finished": list(map(fields_of, outcome.finished))}


def _parse(fields: dict[str, Any], lineage_id: str) -> Learned:
    try:
        values = dict(fields["facts"]["chain"])
        learned = Learned(
            values["prefix"], values["parent"], TaskRecord.from_fields(values["record"]),
            tuple(EpochRecord(**epoch) for epoch in values["epochs"]), values["task_bytes"])
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"the learned model {lineage_id} has no readable records: {error!r}"
                             ) from error
    if learned.prefix != lineage_id:
        raise IntegrityError(f"the learned model {lineage_id} says it is {learned.prefix}")
    return learned
