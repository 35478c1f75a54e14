"""The phases of a run that `train` and `retrain` share, whatever they run on.

    data -> trunk -> features -> experiences

Every phase finds the finished results of earlier runs, so the same command resumes where it
stopped.
"""

import abc
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from partialhn.checkpoints.model import Model
from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.features.jobs import FeatureJob
from partialhn.features.manifest import Manifest
from partialhn.naming import digest_text
from partialhn.networks.backbone import Network
from partialhn.run import TrunkAndHead
from partialhn.training import lineage
from partialhn.training.pretrain import few_for_trunk, load_network
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Outcome
from partialhn.training.slots import Slot
from partialhn.training.together import wanted_at_once
from pipelines.execution.worker import Assignment, OnRecord, divides_tasks
from pipelines.features.in_use import InUse
from pipelines.features.produce import Run, compute_features
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage


class Execution(abc.ABC):
    """The phases of one stream's run.

    A context manager: until it ends, features that the run computed or found are not pruned.
    """

    ends_at_errors = False
    """Whether an error of `on_record` ends the learning at the next record."""

    def __init__(self, config: Config, storage: Storage, stream: str, progress: Progress) -> None:
        self.config, self.storage, self.stream, self.progress = config, storage, stream, progress
        self.folder = storage.path("runs", stream, "learned")
        """Folder of the models after each task (`partialhn.training.lineage`)."""
        self.in_use = InUse(storage, f"stream {stream}")
        self.known: dict[str, lineage.Learned] = {}
        """The learned tasks that were read so far, by lineage id; their records never change."""
        self.newest: tuple[str, Model, int] | None = None
        """The model after the last task that this process has learned: its lineage id, itself, and
        the bytes of its files."""
        self.notes: list[str] = []
        """What the user should know about this run, for `result.json`; each was printed too."""

    def __enter__(self) -> "Execution":
        return self

    def __exit__(self, *error: object) -> None:
        self.in_use.__exit__(*error)

    def network(self, first: Experience,
                on_record: Callable[[EpochRecord], None] = lambda _: None) -> Network:
        """The network from which the trunk is cut: stored, supplied, or trained on the first task.

        `on_record` is called with the record of every epoch, as soon as it ends.
        """
        arguments = (self.config, first, self.storage.filesystem, self.storage.root)
        backbone, network = self.config.backbone, load_network(*arguments)
        few = few_for_trunk(self.config, first)
        if network is None:
            if backbone.adapt_trunk:
                self.progress.line(f"trunk: {backbone.trunk} is adapted to {first.name!r}")
            for record in self._fit_network(first):
                self.progress.trunk(record)
                on_record(record)
            network = load_network(*arguments)
            assert network is not None
            if few:
                self.progress.line(few)
        elif backbone.trunk == "train":
            self.progress.line("trunk: already trained")
        if backbone.trunk != "train":
            self.progress.line(f"trunk: {backbone.trunk}, {network.pixels.described()}"
                               + ", adapted to the first task" * backbone.adapt_trunk)
            for note in network.notes:
                self.progress.line(note)
        if few:
            self.notes.append(few)
        return network

    def features(self, jobs: Sequence[FeatureJob], cut: TrunkAndHead) -> tuple[list[Manifest], int]:
        """Computes the missing features; returns all manifests, and how many images it decoded."""
        manifests, decoded = compute_features(
            self.storage, cut.trunk, jobs, self._featurise(), progress=self.progress.features,
            log=self.progress.line, say=self.note, in_use=self.in_use)
        self.progress.features_done(manifests, decoded)
        return manifests, decoded

    def note(self, line: str) -> None:
        """Prints a line that belongs into the result too."""
        self.progress.line(line)
        self.notes.append(line)

    def learned(self, lineage_ids: Sequence[str]) -> list[lineage.Learned]:
        """The tasks that earlier runs have learned."""
        return lineage.find(self.storage.filesystem, self.folder, lineage_ids, self.known)

    def learn(self, cut: TrunkAndHead, slots: Sequence[Slot], lineage_ids: Sequence[str],
              on_record: OnRecord) -> dict[str, Any]:
        """Learns the tasks that are not learned yet.

        `on_record` is called with every record, as soon as it exists. Returns a dict of `outcomes`
        by strategy, `device` and `peak_rss_bytes`. Raises: InputError for any error that the user
        can correct.
        """
        known = self.learned(lineage_ids)
        if len(known) == len(slots) and not self.config.train.compare:
            return {"outcomes": {self.config.train.strategy: lineage.outcome_of(known)},
                    "peak_rss_bytes": 0, "device": "none: everything was learned before"}

        def show_and_pass_on(strategy: str, record: EpochRecord | TaskRecord) -> None:
            if strategy != self.config.train.strategy or record.task_index >= len(known):
                self.progress.record(strategy, record)
            on_record(strategy, record)

        return self._learn(Assignment(
            self.config, cut, tuple(slots), tuple(lineage_ids), self.storage, self.folder,
            self._run(lineage_ids), self._threads(self._sharers(cut)), tuple(known)),
            show_and_pass_on)

    def _sharers(self, cut: TrunkAndHead) -> int:
        """How many workers, or tasks that one of them learns at once, share this machine's CPUs."""
        compute = self.config.compute
        at_once = wanted_at_once(compute.tasks_at_once, self._learns_on())
        if at_once > 1 and not divides_tasks(self.config, cut):  # which makes a whole strategy
            at_once = 1
        return compute.workers * at_once

    def forget_run(self, lineage_ids: Sequence[str]) -> None:
        """Deletes the intermediate states of a finished run; its models are kept.

        A run with baselines keeps its states, because nothing else holds the baselines' results.
        """
        if not self.config.train.compare:
            with contextlib.suppress(FileNotFoundError):
                self.storage.filesystem.delete_dir(self._run(lineage_ids))

    def _run(self, lineage_ids: Sequence[str]) -> str:
        """The run's folder.

        A run with the same name is resumed, so the name is a hash of everything that is learned,
        baselines included.
        """
        name = digest_text("\n".join([lineage_ids[-1], *self.config.train.compare]), 12)
        return self.storage.path("runs", self.stream, name)

    def _threads(self, shared_by: int) -> int:
        """CPU threads for each of the workers that share this machine."""
        return self.config.compute.threads or max(1, (os.cpu_count() or 1) // shared_by)

    @abc.abstractmethod
    def _learns_on(self) -> torch.device:
        """The device of each worker."""

    @abc.abstractmethod
    def _fit_network(self, first: Experience) -> Iterator[EpochRecord]:
        """Trains and stores the network (`partialhn.training.pretrain.fit_network`)."""

    @abc.abstractmethod
    def _featurise(self) -> Run:
        """The function that computes feature shards."""

    @abc.abstractmethod
    def _learn(self, assignment: Assignment, on_record: OnRecord) -> dict[str, Any]:
        """Lets workers do the assignment; calls `on_record` with their records."""


def our_outcome(returned: dict[str, Any], config: Config) -> Outcome:
    """The outcome of the configured strategy in the result of `Execution.learn`."""
    outcome: Outcome = returned["outcomes"][config.train.strategy]
    return outcome
