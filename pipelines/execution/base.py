"""The stages that `train` and `retrain` share, wherever they run.

    data -> trunk -> features -> experiences

Every stage finds what an earlier run finished, so the same command goes on where it stopped.
"""

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.features.extract import FeatureJob
from partialhn.features.manifest import Manifest
from partialhn.naming import digest_text
from partialhn.networks.backbone import Network
from partialhn.run import CutNetwork
from partialhn.training import lineage
from partialhn.training.pretrain import load_network
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Outcome
from partialhn.training.slots import Slot
from pipelines.execution.worker import Assignment, OnRecord
from pipelines.features.in_use import InUse
from pipelines.features.produce import Run, compute_features
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage


class Execution(abc.ABC):
    """The stages of one stream's run.

    A context: inside it no features that the stages made or found are pruned.
    """

    def __init__(self, config: Config, storage: Storage, stream: str, progress: Progress) -> None:
        self.config, self.storage, self.stream, self.progress = config, storage, stream, progress
        self.folder = storage.path("runs", stream, "learned")
        """Where the models after each task are (`partialhn.training.lineage`)."""
        self.in_use = InUse(storage, f"stream {stream}")

    def __enter__(self) -> "Execution":
        return self

    def __exit__(self, *error: object) -> None:
        self.in_use.__exit__(*error)

    def network(self, first: Experience,
                follow: Callable[[EpochRecord], None] = lambda _: None) -> Network:
        """The network the trunk is cut from: found, or trained on the first task.

        `follow` gets the record of every epoch as it comes.
        """
        arguments = (self.config, first, self.storage.filesystem, self.storage.root)
        network = load_network(*arguments)
        if network is not None:
            self.progress.line("trunk: found, not trained again")
            return network
        for record in self._fit_network(first):
            self.progress.trunk(record)
            follow(record)
        network = load_network(*arguments)
        assert network is not None
        return network

    def features(self, jobs: Sequence[FeatureJob], cut: CutNetwork) -> tuple[list[Manifest], int]:
        """The features of all jobs, and how many images had to be decoded."""
        manifests, decoded = compute_features(
            self.storage, cut.trunk, jobs, self._featurise(), progress=self.progress.features,
            log=self.progress.line, in_use=self.in_use)
        self.progress.features_done(manifests, decoded)
        return manifests, decoded

    def learned(self, lineage_ids: Sequence[str]) -> list[lineage.Learned]:
        """The tasks that an earlier run learned."""
        return lineage.find(self.storage.filesystem, self.folder, lineage_ids)

    def learn(self, cut: CutNetwork, slots: Sequence[Slot], lineage_ids: Sequence[str],
              follow: OnRecord) -> dict[str, Any]:
        """Learns what is not learned yet.

        `follow` gets every record as it comes. Returns `outcomes` by strategy, `device` and
        `peak_rss_bytes`. Raises: InputError for anything the user can set right.
        """
        known = self.learned(lineage_ids)
        if len(known) == len(slots) and not self.config.train.compare:
            return {"outcomes": {self.config.train.strategy: lineage.outcome_of(known)},
                    "peak_rss_bytes": 0, "device": "none: everything was learned before"}

        def tell(strategy: str, record: EpochRecord | TaskRecord) -> None:
            self.progress.record(strategy, record)
            follow(strategy, record)

        return self._learn(Assignment(
            self.config, cut, tuple(slots), tuple(lineage_ids), self.storage, self.folder,
            self._run(lineage_ids), self._threads(self.config.compute.workers)), tell)

    def forget_run(self, lineage_ids: Sequence[str]) -> None:
        """Removes the states that a finished run kept on its way; what it learned is kept.

        Those of baselines stay: nothing else remembers what they learned.
        """
        if not self.config.train.compare:
            with contextlib.suppress(FileNotFoundError):
                self.storage.filesystem.delete_dir(self._run(lineage_ids))

    def _run(self, lineage_ids: Sequence[str]) -> str:
        """The run's folder. Same name = the run goes on, so it says all that is learned, baselines
        too.
        """
        name = digest_text("\n".join([lineage_ids[-1], *self.config.train.compare]), 12)
        return self.storage.path("runs", self.stream, name)

    def _threads(self, shared_by: int) -> int:
        """CPU threads of each of so many workers."""
        return self.config.compute.threads or max(1, (os.cpu_count() or 1) // shared_by)

    @abc.abstractmethod
    def _fit_network(self, first: Experience) -> Iterator[EpochRecord]:
        """Trains the network and stores it (`partialhn.training.pretrain.fit_network`)."""

    @abc.abstractmethod
    def _featurise(self) -> Run:
        """What computes shards."""

    @abc.abstractmethod
    def _learn(self, assignment: Assignment, tell: OnRecord) -> dict[str, Any]:
        """Has workers do the assignment, and `tell` called with their records as they come."""


def our_outcome(returned: dict[str, Any], config: Config) -> Outcome:
    """What the configured strategy did, of what `Execution.learn` returned."""
    outcome: Outcome = returned["outcomes"][config.train.strategy]
    return outcome
