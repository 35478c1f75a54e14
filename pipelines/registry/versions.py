"""Registered versions: their tags and aliases. This file does not use MLflow."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.naming import digest_text
from partialhn.training.records import Forgotten

CHAMPION = "champion"
"""Alias of the version in use: the newest that passed the gate, or one that a person chose."""
CHALLENGER = "challenger"
"""Alias of the newest version that the gate refused."""
GATE, DECISION, FILES = "gate", "gate_decision", "files_sha256"
"""Tags of a version: `passed` or `failed`; the whole decision with its numbers, as JSON; the
SHA-256 of each file of the version by its path, as JSON."""


@dataclasses.dataclass(frozen=True)
class Registration:
    """The tags of a registered version."""

    stream: str
    work: str
    """Identifies the stream's configuration and data."""
    task: str
    task_index: int
    classes: tuple[str, ...]
    trunk_fingerprint: str
    feature_keys: tuple[str, ...]
    weights_hash: str
    acc: float
    """Mean accuracy over the tasks so far, after this one; 0 to 1, like the next two."""
    learning_accuracy: float
    forgetting: float
    storage: str
    """URI of the storage with the features, in <storage>/features/<key>."""
    prefix: str
    """Lineage id of the model after this task (`partialhn.training.lineage`); there is one version
    for each."""
    parent: str
    """Lineage id of the model that it was learned from; empty for the first task."""
    stands_on: tuple[str, ...] = ()
    """For a version that has forgotten a task, the lineage ids of the versions in which the other
    tasks were learned, oldest first."""
    forgotten: tuple[Mapping[str, Any], ...] = ()
    """The tasks that it has forgotten (`partialhn.training.records.Forgotten`)."""
    without_task_id: Mapping[str, float] | None = None
    """Accuracy of task auto on the test images, as in result.json; None: not measured."""

    def tags(self) -> dict[str, str]:
        """The fields as strings for MLflow; tuples and mappings become JSON, and the last three
        fields no tag where they are empty.
        """
        fields = dataclasses.asdict(self)
        for key in ("stands_on", "forgotten", "without_task_id"):
            if not fields[key]:
                del fields[key]
        return {key: json.dumps(value) if isinstance(value, tuple | dict) else str(value)
                for key, value in fields.items()}


@dataclasses.dataclass(frozen=True)
class Version:
    """One registered version of a stream's model."""

    stream: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    tags: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"models:/{self.stream}/{self.version}"

    def fields(self) -> dict[str, Any]:
        """This version's entry in `versions` of result.json."""
        return {"task": self.task, "version": self.version, "uri": self.uri,
                "run_id": self.run_id, "aliases": list(self.aliases)}

    @property
    def task(self) -> str:
        return self.tags["task"]

    @property
    def task_index(self) -> int:
        return int(self.tags["task_index"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of its task."""
        return tuple(json.loads(self.tags["classes"]))

    @property
    def feature_keys(self) -> tuple[str, ...]:
        """Keys of the stored features of its task."""
        return tuple(json.loads(self.tags["feature_keys"]))

    @property
    def stands_on(self) -> tuple[str, ...] | None:
        """As `Registration.stands_on`; None for a version that was learned on top of its parent."""
        text = self.tags.get("stands_on")
        return tuple(json.loads(text)) if text else None

    @property
    def forgotten(self) -> tuple[Forgotten, ...]:
        """The tasks that it has forgotten, oldest first."""
        return tuple(map(Forgotten.from_fields, json.loads(self.tags.get("forgotten", "[]"))))

    @property
    def without_task_id(self) -> dict[str, float] | None:
        """As `Registration.without_task_id`; None where its version was registered without it."""
        text = self.tags.get("without_task_id")
        return json.loads(text) if text else None

    @property
    def metrics(self) -> dict[str, float]:
        """Accuracies over the tasks so far, after this version's task."""
        return {key: float(self.tags[key]) for key in ("acc", "learning_accuracy", "forgetting")}

    @property
    def decision(self) -> dict[str, Any] | None:
        """The gate's decision (`pipelines.gate.Decision.fields`); None without a gate."""
        text = self.tags.get(DECISION)
        return json.loads(text) if text else None


def is_ours(alias: str) -> bool:
    """Whether this project moves the alias; a user's own aliases are never changed."""
    return alias in (CHAMPION, CHALLENGER) or alias.startswith("task-")


def chain_of(versions: Sequence[Version], newest: Version) -> list[Version]:
    """The version `newest` and those that it was learned from, in the order of the tasks.

    Below a version that has forgotten a task, they are those in which the other tasks were learned.
    """
    by_lineage_id = {version.tags.get("prefix", ""): version for version in versions}
    chain = [newest]
    while True:
        stands_on = chain[-1].stands_on
        if stands_on is not None:
            earlier = [by_lineage_id[key] for key in stands_on if key in by_lineage_id]
            return earlier + chain[::-1]
        parent = by_lineage_id.get(chain[-1].tags.get("parent") or "none")
        if parent is None:
            return chain[::-1]
        chain.append(parent)


def challenger_of(versions: Sequence[Version]) -> Version | None:
    """The version that the gate refused last, if it is newer than the champion; otherwise None."""
    by_alias = {alias: version for version in versions for alias in version.aliases}
    refused, champion = by_alias.get(CHALLENGER), by_alias.get(CHAMPION)
    if refused is None or (champion is not None and champion.version >= refused.version):
        return None
    return refused


def task_alias(task: str) -> str:
    """The alias of the version that introduced a task: task-<name>.

    Characters that MLflow does not allow are replaced by -, and a short hash is added, so that two
    names never get the same alias.
    """
    clean = re.sub(r"[^A-Za-z0-9_-]", "-", task)[:200]
    return f"task-{clean}" if clean == task else (
        f"task-{clean}-{digest_text(task, 6)}")
