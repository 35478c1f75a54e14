"""The stages in this process: one machine and one worker have nothing to distribute."""

from collections.abc import Iterator
from typing import Any

import torch

from partialhn.arithmetic import set_arithmetic
from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.pretrain import fit_network
from partialhn.stream import Experience
from partialhn.train import EpochRecord
from pipelines.features.produce import Run, in_process
from pipelines.progress import Progress
from pipelines.stages.base import Stages
from pipelines.stages.worker import Assignment, Follow, Worker
from pipelines.stages.worker_process import ProcessHost
from pipelines.storage import Storage


class ProcessStages(Stages):
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
        set_arithmetic(self._threads(1))

    def _fit_network(self, first: Experience) -> Iterator[EpochRecord]:
        return fit_network(self.config, first, self.storage.filesystem, self.storage.root,
                           self.device)

    def _featurise(self) -> Run:
        return in_process(self.device)

    def _learn(self, assignment: Assignment, tell: Follow) -> dict[str, Any]:
        with ProcessHost(self.storage, assignment.run, self.device, tell) as host:
            return Worker(assignment, host).run()
