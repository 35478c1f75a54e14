"""Executes the phases of a run in this process, for one machine and one worker.

The state of the run is kept in the storage; a thread receives its records and registers versions.
"""

import concurrent.futures
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.features.batches import Workers
from partialhn.networks.precision import choose_device, configure_torch
from partialhn.training.pretrain import fit_network
from partialhn.training.records import EpochRecord, TaskRecord
from pipelines.execution.base import Execution
from pipelines.execution.run_states import States
from pipelines.execution.worker import Assignment, OnRecord, Worker
from pipelines.features.produce import Run, in_process
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage


class LocalExecution(Execution):
    """Executes trunk, features and experiences one after the other in this process."""

    ends_at_errors = True

    def __init__(self, config: Config, storage: Storage, stream: str, progress: Progress) -> None:
        """Chooses device and threads. Raises: InputError if a GPU is required but not available."""
        super().__init__(config, storage, stream, progress)
        self.device = choose_device(config.compute.device)
        configure_torch(self._threads(1))

    def _learns_on(self) -> torch.device:
        return self.device

    def _fit_network(self, first: Experience) -> Iterator[EpochRecord]:
        return fit_network(self.config, first, self.storage.filesystem, self.storage.root,
                           self.device)

    def _featurise(self) -> Run:
        return in_process(self.device)

    def _learn(self, assignment: Assignment, on_record: OnRecord) -> dict[str, Any]:
        with ProcessHost(self.storage, assignment.run, self.device, on_record,
                         self.progress.line) as host:
            worker = Worker(assignment, host)
            result = worker.run()
        self.newest = worker.newest
        return result


class ProcessHost:
    """The worker's host in this process.

    A context manager: at its end `on_record` has been called with every record. It runs in a
    thread of its own, in order, so that a version is registered while the next task is learned.
    Its errors are raised by the next `send`, or at the end.
    """

    def __init__(self, storage: Storage, run: str, device: torch.device,
                 on_record: OnRecord, show: Callable[[str], None]) -> None:
        """run: folder of the run, as a path in the storage's filesystem. show: prints a line."""
        self.device, self.workers = device, Workers()
        self._states, self._on_record, self._show = States(storage, run), on_record, show
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "records")
        self._error: Exception | None = None

    def send(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        if self._error is not None:
            raise self._error
        self._thread.submit(self._pass_on, strategy, record)

    def say(self, line: str) -> None:
        self._thread.submit(self._show, line)

    def keep(self, state: Path | None) -> None:
        assert state is not None, "there is one worker"
        self._states.keep(state)

    def fetch(self, folder: Path) -> bool:
        return self._states.fetch(folder)

    def _pass_on(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        if self._error is None:  # records must come in order, so none follows a failed one
            try:
                self._on_record(strategy, record)
            except Exception as error:
                self._error = error

    def __enter__(self) -> "ProcessHost":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        interrupted = kind is not None and not issubclass(kind, Exception)
        self._thread.shutdown(cancel_futures=interrupted)
        if kind is None and self._error is not None:
            raise self._error
