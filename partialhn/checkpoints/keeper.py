"""Keeps the state of a training beside its steps, at most every few seconds."""

import concurrent.futures
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow.fs as pafs
from torch import Tensor

from partialhn.checkpoints import checkpoint

KEEP_SECONDS = 10.0
"""Seconds between two states that are written: what a killed training loses at most, besides the
running epoch."""


class StateKeeper:
    """Writes states that are offered, in a thread of its own; a context manager.

    A state that comes too early, or while another is being written, is not copied and not written.
    Where the caller stops at an offered state, that one is written before the context ends; where
    it ends by itself nothing more is.

    Args:
        filesystem: where the states go.
        target: the folder there; each state replaces the one before.
        kind: the kind of checkpoint.
        seconds: least time between two writes.
    """

    def __init__(self, filesystem: pafs.FileSystem, target: str, kind: str,
                 seconds: float = KEEP_SECONDS) -> None:
        self._place, self._kind, self._seconds = (filesystem, target), kind, seconds
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "state")
        self._writing: concurrent.futures.Future[None] | None = None
        self._last = time.monotonic()
        self._offered: tuple[Mapping[str, Tensor], dict[str, Any]] | None = None

    def offer(self, tensors: Mapping[str, Tensor], fields: dict[str, Any]) -> None:
        """Offers the state of the training as it is now. Raises: what writing an earlier one did.

        tensors: may be the training's own; they are copied, on their device, if they are written.
        """
        self._offered = tensors, fields
        if self._writing is not None and self._writing.done():
            self._writing.result()
        elif self._writing is not None:
            return
        if time.monotonic() - self._last >= self._seconds:
            self._last, self._offered = time.monotonic(), None
            copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self._writing = self._thread.submit(self._write, copies, fields)

    def _write(self, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "state"
            checkpoint.save(folder, self._kind, tensors, fields)
            checkpoint.upload(folder, *self._place)

    def __enter__(self) -> "StateKeeper":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._thread.shutdown()
        if kind is None and self._writing is not None:
            self._writing.result()
        if kind is not None and issubclass(kind, GeneratorExit) and self._offered is not None:
            self._write(dict(self._offered[0]), self._offered[1])
