"""The state of a running training, kept in the storage every few seconds."""

import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from partialhn.checkpoints import checkpoint
from pipelines.platform.storage import Storage

SECONDS = 10.0
"""Seconds between two states in the middle of a task."""


class States:
    """The newest state of one writer.

    <folder>/state-<number>/    a state; it is deleted after the next one is written
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        """folder: a path in the storage's filesystem."""
        self._storage, self._folder = storage, folder
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether more than SECONDS have passed since the last state (at first, since now)."""
        return time.monotonic() - self._last > SECONDS

    def keep(self, state: Path) -> None:
        """Stores a checkpoint folder as the newest state and deletes the earlier ones."""
        before = self._names()
        number = 1 + int(before[-1].rpartition("-")[2]) if before else 0
        checkpoint.upload(state, self._storage.filesystem, f"{self._folder}/state-{number:08d}")
        for name in before:
            self._storage.delete(f"{self._folder}/{name}")
        self._last = time.monotonic()

    def fetch(self, folder: Path) -> bool:
        """Copies the newest complete state into a folder; returns False if there is none."""
        return any(checkpoint.fetch(self._storage.filesystem, f"{self._folder}/{name}", folder)
                   for name in reversed(self._names()))

    def save(self, kind: str, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        """Stores tensors and fields as the newest state."""
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.save(Path(scratch) / "state", kind, tensors, fields)
            self.keep(Path(scratch) / "state")

    def load(self, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest state that `save` stored, or None."""
        with tempfile.TemporaryDirectory() as scratch:
            return checkpoint.load(Path(scratch), kind) if self.fetch(Path(scratch)) else None

    def delete(self) -> None:
        """Deletes all states."""
        self._storage.delete(self._folder)

    def _names(self) -> list[str]:
        """Names of the states, oldest first; the last is incomplete if its writer was killed."""
        return [name for name in self._storage.folders(self._folder)
                if name.startswith("state-")]
