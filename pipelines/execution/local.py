"""The phases of a run in this process: one machine and one worker have nothing to distribute.

The state of a run is kept in the storage, and its records go to a thread that registers them.
"""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.errors import InputError
from partialhn.features.batches import Workers
from partialhn.networks.precision import configure_torch
from partialhn.training.pretrain import fit_network
from partialhn.training.records import EpochRecord, TaskRecord
from pipelines.execution.base import Execution
from pipelines.execution.run_states import States
from pipelines.execution.worker import Assignment, OnRecord, Worker
from pipelines.features.produce import Run, in_process
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage


class LocalExecution(Execution):
    """Trunk, features and experiences one after the other, here."""

    def __init__(self, config: Config, storage: Storage, stream: str, progress: Progress) -> None:
        """Decides on device and threads. Raises: InputError for a GPU that is not there."""
        super().__init__(config, storage, stream, progress)
        wanted = config.compute.device
        there = wanted != "cpu" and torch.cuda.is_available()
        if wanted == "gpu" and not there:
            raise InputError("device is 'gpu' and this machine has none that CUDA can use; "
                             "allowed: auto, cpu, or a machine with one")
        self.device = torch.device("cuda" if there else "cpu")
        configure_torch(self._threads(1))

    def _fit_network(self, first: Experience) -> Iterator[EpochRecord]:
        return fit_network(self.config, first, self.storage.filesystem, self.storage.root,
                           self.device)

    def _featurise(self) -> Run:
        return in_process(self.device)

    def _learn(self, assignment: Assignment, tell: OnRecord) -> dict[str, Any]:
        with ProcessHost(self.storage, assignment.run, self.device, tell) as host:
            return Worker(assignment, host).run()


class ProcessHost:
    """This process. A context: at its end every record has been followed.

    `follow` runs in a thread of its own, in order, so that a version is registered while the next
    task is learned. What it raises is raised by the next `send`, or at the end.
    """

    def __init__(self, storage: Storage, run: str, device: torch.device, follow: OnRecord) -> None:
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
