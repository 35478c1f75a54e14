"""What a registered version says of itself, and the names it is found by. Knows no MLflow."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

CHAMPION = "champion"
"""Alias of the newest version."""


@dataclasses.dataclass(frozen=True)
class Registration:
    """What a registered version is tagged with."""

    stream: str
    work: str
    """Names what is learned: the stream's configuration and data."""
    task: str
    task_index: int
    classes: tuple[str, ...]
    trunk_fingerprint: str
    feature_keys: tuple[str, ...]
    weights_hash: str
    acc: float
    """Mean accuracy over the tasks so far, after this one; 0 to 1, like the two below."""
    learning_accuracy: float
    forgetting: float
    storage: str
    """Where the features lie: <storage>/features/<key>."""
    prefix: str
    """Names the model after this task (`partialhn.chain`): one version for each."""
    parent: str
    """The prefix that it was learned from; empty for a first task."""

    def tags(self) -> dict[str, str]:
        """Strings for MLflow; tuples become JSON lists."""
        return {key: json.dumps(value) if isinstance(value, tuple) else str(value)
                for key, value in dataclasses.asdict(self).items()}


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
        """The entry of `versions` in result.json."""
        return {"task": self.task, "version": self.version, "uri": self.uri,
                "run_id": self.run_id, "aliases": list(self.aliases)}

    @property
    def task(self) -> str:
        return self.tags["task"]

    @property
    def task_index(self) -> int:
        return int(self.tags["task_index"])


def task_alias(task: str) -> str:
    """The alias of the version that introduced a task: task-<name> in MLflow's alphabet.

    A name with other characters gets them replaced by - and a short hash, so that two names
    never share an alias.
    """
    clean = re.sub(r"[^A-Za-z0-9_-]", "-", task)[:200]
    return f"task-{clean}" if clean == task else (
        f"task-{clean}-{hashlib.sha256(task.encode()).hexdigest()[:6]}")
