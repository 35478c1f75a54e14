"""A worker in this process: its state in the storage, its records to a thread that follows."""

import concurrent.futures
from pathlib import Path

import torch

from partialhn.batches import Workers
from partialhn.train import EpochRecord, TaskRecord
from pipelines.stages.states import States
from pipelines.stages.worker import Follow
from pipelines.storage import Storage


class ProcessHost:
    """This process. A context: at its end every record has been followed.

    `follow` runs in a thread of its own, in order, so that a version is registered while the next
    task is learned. What it raises is raised by the next `send`, or at the end.
    """

    def __init__(self, storage: Storage, run: str, device: torch.device, follow: Follow) -> None:
        """run: folder of the run, as a path in the storage's filesystem."""
        self.device, self.workers = device, Workers()
        self._states, self._follow = States(storage, run), follow
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "follow")
        self._error: Exception | None = None

    def send(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        if self._error is not None:
            raise self._error
        self._thread.submit(self._tell, strategy, record)

    def keep(self, state: Path | None) -> None:
        assert state is not None, "there is one worker"
        self._states.keep(state)

    def fetch(self, folder: Path) -> bool:
        return self._states.fetch(folder)

    def _tell(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        if self._error is None:  # after a failure nothing is in order any more
            try:
                self._follow(strategy, record)
            except Exception as error:
                self._error = error

    def __enter__(self) -> "ProcessHost":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._thread.shutdown(cancel_futures=interrupted)
        if kind is None and self._error is not None:
            raise self._error
