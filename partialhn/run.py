"""A whole stream in one process: the main job without a cluster, and the oracle of `pipelines/`.

network = trained on the first task | trunk, head = cut at the freeze depth |
features of every task, computed once | one experience after the other | a Model
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import Config, StrategyName
from partialhn.data.datasets import open_stream
from partialhn.data.experience import Experience
from partialhn.detector.detector import Detector
from partialhn.environment import check_arithmetic, check_threads
from partialhn.features.codec import number_type
from partialhn.features.extract import precompute
from partialhn.features.jobs import FeatureJob
from partialhn.features.manifest import Manifest
from partialhn.features.store import FeatureStore
from partialhn.naming import digest_text
from partialhn.networks.backbone import Network, build_network, from_map
from partialhn.networks.cut import CutNetwork, depth_number
from partialhn.networks.head import Head, HeadStart, check_feature_size, head_start
from partialhn.networks.precision import configure_torch
from partialhn.networks.trunk import Trunk, multiply_adds
from partialhn.strategies import STRATEGIES, Strategy
from partialhn.training import lineage
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.lineage import lineage_ids_of
from partialhn.training.pretrain import few_for_trunk, fit_network, load_network
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Clock, Outcome, result_fields
from partialhn.training.slots import (
    Slot,
    featured_slots,
    open_task_features,
    slots_of,
    stored_slots,
)
from partialhn.training.steps import StepRecorder, recorder_for
from partialhn.training.stream_at_once import learn_at_once
from partialhn.training.together import at_once, divided_threads, needed_bytes

Report = Callable[[EpochRecord | TaskRecord], None]


@dataclasses.dataclass(frozen=True)
class TrunkAndHead:
    """The networks that all strategies of a stream share."""

    trunk: Trunk
    head: Head
    start: HeadStart
    """The weights that the first head starts from."""
    macs: dict[str, float]
    """Multiply-adds of one image through trunk and head, and the trunk's share."""
    network: str
    """SHA-256 of the weights of the network that was cut, except its classifier's, and of the way
    an image becomes its input."""

    def strategy(self, config: Config) -> Strategy:
        """A fresh strategy as configured, before its first task."""
        return STRATEGIES[config.train.strategy](self.head, self.start, config)

    def apart(self) -> "TrunkAndHead":
        """The same with a head of its own, for another thread: while a head computes, it holds the
        weights of one task.
        """
        return dataclasses.replace(self, head=copy.deepcopy(self.head))


def cut_network(config: Config, network: Network) -> TrunkAndHead:
    """Cuts the network at the configured depth. Raises: InputError for one it does not have."""
    cut = CutNetwork.of(network, config.backbone.depth)
    size = config.data.input_size
    images_BCHW = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    z_BCHW = cut.trunk(images_BCHW)
    below = multiply_adds(cut.trunk, images_BCHW)
    above = multiply_adds(cut.stages, from_map(z_BCHW, cut.feature_layout)) + cut.width * 2
    hypernet = config.hypernet
    return TrunkAndHead(
        cut.trunk, Head(cut, hypernet.norm, hypernet.norm_groups, config.train.precision,
                        hypernet.generate),
        head_start(cut, hypernet.norm, config.train.seed, hypernet.generate),
        {"trunk": below, "head": above, "frozen_share": below / (below + above)},
        network.fingerprint())


def with_depth_number(config: Config) -> Config:
    """The configuration with its freeze depth as a number.

    Raises: InputError for a depth that the network does not have.
    """
    backbone = config.backbone
    if isinstance(backbone.freeze_depth, int):
        return config
    network = build_network(backbone.backbone, 2, input_size=config.data.input_size)
    number = depth_number(backbone.freeze_depth, list(network.blocks()), backbone.backbone)
    return dataclasses.replace(config, backbone=dataclasses.replace(backbone, freeze_depth=number))


def check(config: Config, network: Network | None = None) -> None:
    """Checks what can be checked before anything is read or trained: networks, strategies, number
    types, threads.

    network: the configured network, where it is at hand; it is built otherwise.

    Raises: InputError naming the option that does not fit.
    """
    check_threads(config.compute.threads)
    check_arithmetic(config.backbone.trunk_arithmetic)
    network = network or build_network(config.backbone.backbone, 2,
                                       input_size=config.data.input_size)
    cut = CutNetwork.of(network, config.backbone.depth)
    check_feature_size(config.hypernet.norm, cut, config.data.input_size)
    Head(cut, config.hypernet.norm, config.hypernet.norm_groups, generate=config.hypernet.generate)
    for name in (config.train.strategy, *config.train.compare):
        STRATEGIES[name]  # imports and checks the class
    number_type(config.features.feature_dtype)


def collect(store: FeatureStore, jobs: Sequence[FeatureJob], manifests: Sequence[Manifest],
            experiences: Sequence[Experience]) -> list[TaskFeatures]:
    """Opens the features of every task."""
    return open_task_features(store, slots_of(experiences, jobs, manifests))


def work_name(config: Config, experiences: Sequence[Experience]) -> str:
    """A name for the work: equal for runs that learn the same thing from the same images."""
    lines = [config.work_hash(), *(task.name + task.fingerprint for task in experiences)]
    return digest_text("\n".join(lines), 12)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """A stream that was learned."""

    model: Model
    """The model after the last task."""
    records: tuple[TaskRecord, ...]
    """One record a task, oldest first."""
    fields: dict[str, Any]
    """The fields of `result.json` that need no registry."""


def run_stream(config: Config, root: str | Path, report: Report | None = None) -> RunResult:
    """Learns the configured stream below the folder `root` in this process, on the CPU.

    Tasks that an earlier run learned there are not learned again. `report` is called with every
    record as it comes.

    Raises: InputError for anything the user can set right.
    """
    run = StreamRun(config, Path(root))
    for record in run.records():
        if report:
            report(record)
    return RunResult(run.model(), tuple(run.learner.finished), run.fields())


class StreamRun:
    """A stream on its way through one process; `records` is the whole way.

    network -> features -> the tasks, one after the other -> the strategies to compare with
    """

    def __init__(self, config: Config, root: Path, device: torch.device | str = "cpu") -> None:
        """Opens the data and finds what an earlier run learned below `root`; learns nothing.

        Raises: InputError for a configuration or data that cannot be used.
        """
        config = with_depth_number(config)
        check(config)
        self.clock = Clock()
        configure_torch(config.compute.threads)
        self.root, self.device = root, torch.device(device)
        self.filesystem = pafs.LocalFileSystem()
        self.config = lineage.as_begun(config, self.filesystem, self.folder)
        self.store = FeatureStore(self.filesystem, str(root))
        self.experiences = open_stream(self.config.data, root / "datasets")
        self.clock.lap("data")
        self.known: list[lineage.Learned] = []
        """The tasks that are learned and stored, oldest first."""
        self.decoded = 0
        """Images that were decoded to compute features."""
        self.notes: tuple[str, ...] = ()
        """What a user should know about the weights of a supplied trunk."""
        self.said: list[str] = []
        """What the user should know about the run; each line was a warning too."""
        self._cut: TrunkAndHead | None = None
        self._learner: Learner | None = None
        self._baselines: dict[str, Outcome] = {}
        self._open_network()

    @property
    def folder(self) -> str:
        """The folder of the models after each task (`partialhn.training.lineage`)."""
        return f"{self.root}/learned"

    @property
    def cut(self) -> TrunkAndHead:
        """Trunk and head, once the network is trained."""
        assert self._cut is not None, "the network is not trained yet"
        return self._cut

    @property
    def learner(self) -> Learner:
        """The configured strategy, once the features are computed."""
        assert self._learner is not None, "the features are not computed yet"
        return self._learner

    @property
    def lineage_ids(self) -> tuple[str, ...]:
        """The names of the models after each task."""
        return lineage_ids_of(self.config, self.cut.network, self.experiences)

    def records(self) -> Iterator[EpochRecord | TaskRecord]:
        """Does everything that is left, and yields every record as it comes."""
        yield from self.fit_network()
        self.prepare()
        yield from self.learn()
        for _, record in self.compare():
            yield record

    def fit_network(self) -> Iterator[EpochRecord]:
        """Trains the network on the first task, where it was not trained before."""
        if self._cut is None:
            yield from fit_network(self.config, self.experiences[0], self.filesystem,
                                   str(self.root), self.device)
            self._open_network()
            if few := few_for_trunk(self.config, self.experiences[0]):
                warnings.warn(few, stacklevel=2)
        self.clock.lap("trunk")

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Computes the features that are needed, and makes a learner that knows what is learned.

        progress: called with the shards of features done and in all.
        """
        first = 0 if self.config.train.needs_every_task else len(self.known)
        trunk = copy.deepcopy(self.cut.trunk).to(self.device)
        slots, self.decoded = featured_slots(
            self.config, self.experiences, len(self.known), self.cut.trunk, self.store,
            lambda jobs: precompute(self.store, trunk, jobs, progress, self._say)[1])
        self.tasks = open_task_features(self.store, slots, range(first, len(slots)))
        self.clock.lap("features")
        learner = Learner(self.cut.strategy(self.config), self.config.train, self.device,
                          inference=self._detector(), recorder=self._recorder())
        if self.known:
            learner.restore(*lineage.state(self.filesystem, self.folder, self.known))
        self._learner = learner

    def learn(self) -> Iterator[EpochRecord | TaskRecord]:
        """Learns the tasks that are left; a task's model is stored before its record comes."""
        try:
            for record in self._learn():
                if isinstance(record, TaskRecord):
                    done = lineage.Learned.of(Outcome.of(self.learner), self.lineage_ids,
                                              record.task_index)
                    lineage.keep(self.model(), done, self.filesystem, self.folder)
                    self.known.append(done)
                yield record
        finally:  # a caller may stop after any task
            self.clock.lap("train")

    def _learn(self) -> Iterator[EpochRecord | TaskRecord]:
        """Learns the tasks one after the other, or several at once."""
        needs = [needed_bytes(task) for task in self.tasks[max(1, len(self.known)):]]
        count = at_once(self.config.compute.tasks_at_once, needs, self.device)
        if count == 1 or not self.learner.strategy.independent:
            yield from self.learner.learn(self.tasks)
            return

        def new_learner(cut: TrunkAndHead) -> Learner:
            return Learner(cut.strategy(self.config), self.config.train, self.device,
                           recorder=self._recorder())

        with divided_threads(count, self.config.compute.threads, self.device):
            yield from learn_at_once(
                self.learner, self.tasks,
                [functools.partial(new_learner, self.cut.apart()) for _ in range(count)],
                self._detector)

    def _detector(self) -> Detector:
        return Detector(self.config.train.detector_features, self.config.train.false_alarms)

    def compare(self) -> Iterator[tuple[StrategyName, EpochRecord | TaskRecord]]:
        """Learns the same tasks by the strategies to compare with; yields strategy and record."""
        for name in self.config.train.compare:
            baseline = Learner(self.cut.strategy(with_strategy(self.config, name)),
                               self.config.train, self.device, recorder=self._recorder())
            for record in baseline.learn(self.tasks):
                yield name, record
            self._baselines[name] = Outcome.of(baseline)
        self.clock.lap("train")

    def _recorder(self) -> StepRecorder | None:
        return recorder_for(self.device, self.config.compute.cuda_graphs)

    def slots(self) -> list[Slot]:
        """Every task with the features of it that are stored."""
        return stored_slots(self.config, self.experiences, self.cut.trunk, self.store)

    def outcomes(self) -> dict[str, Outcome]:
        """What every strategy did so far, the configured one first."""
        ours = Outcome.of(self._learner) if self._learner else lineage.outcome_of(self.known)
        return {self.config.train.strategy: ours} | self._baselines

    def model(self) -> Model:
        """The learner's model after the tasks so far."""
        tasks = self.experiences[:len(self.learner.finished)]
        return Model(self.config, self.cut.trunk, self.learner.strategy,
                     tuple(TaskInfo(each.name, each.classes) for each in tasks),
                     inference=self.learner.inference)

    def fields(self) -> dict[str, Any]:
        """The fields of `result.json` that need no registry, once every task is learned."""
        return result_fields(self.config, self.slots(), self.cut.macs, self.decoded,
                             self.outcomes(), self.clock.laps, self.said) | {
                                 "weights_hash": self.model().weights_hash()}

    def _say(self, line: str) -> None:
        """Warns, and keeps the line for the result."""
        warnings.warn(line, stacklevel=2)
        self.said.append(line)

    def _open_network(self) -> None:
        """Cuts the network, where there is one, and finds the tasks learned with it."""
        network = load_network(self.config, self.experiences[0], self.filesystem, str(self.root))
        if network is not None:
            self.notes = network.notes
            if few := few_for_trunk(self.config, self.experiences[0]):
                self.said.append(few)
            self._cut = cut_network(self.config, network)
            self.known = lineage.find(self.filesystem, self.folder, self.lineage_ids)


def with_strategy(config: Config, name: StrategyName) -> Config:
    """The same configuration for another strategy."""
    return dataclasses.replace(config, train=config.train.alone(name))
