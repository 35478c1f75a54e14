"""The state of what is being learned, kept in the storage every few seconds."""

import tempfile
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from partialhn.checkpoints import checkpoint
from pipelines.platform.storage import Storage

SECONDS = 10.0
"""Between two states in the middle of a task."""


class States:
    """The newest state of one writer.

    <folder>/state-<number>/    a state; the next is written beside it before it goes
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        """folder: as a path in the storage's filesystem."""
        self._storage, self._folder = storage, folder
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last state, or the beginning, is long ago."""
        return time.monotonic() - self._last > SECONDS

    def keep(self, state: Path) -> None:
        """Keeps a checkpoint folder in place of the one before."""
        before = self._names()
        number = 1 + int(before[-1].rpartition("-")[2]) if before else 0
        checkpoint.upload(state, self._storage.filesystem, f"{self._folder}/state-{number:08d}")
        for name in before:
            self._storage.delete(f"{self._folder}/{name}")
        self._last = time.monotonic()

    def fetch(self, folder: Path) -> bool:
        """Copies the newest whole state into a folder; False where there is none."""
        return any(checkpoint.fetch(self._storage.filesystem, f"{self._folder}/{name}", folder)
                   for name in reversed(self._names()))

    def save(self, kind: str, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        """Keeps a state that is not a folder yet."""
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint.save(Path(scratch) / "state", kind, tensors, fields)
            self.keep(Path(scratch) / "state")

    def load(self, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `save` kept last; None where there is nothing."""
        with tempfile.TemporaryDirectory() as scratch:
            return checkpoint.load(Path(scratch), kind) if self.fetch(Path(scratch)) else None

    def delete(self) -> None:
        """Deletes all states."""
        self._storage.delete(self._folder)

    def _names(self) -> list[str]:
        """Oldest first; the last is not whole where its writer was killed."""
        return [name for name in self._storage.folders(self._folder)
                if name.startswith("state-")]
