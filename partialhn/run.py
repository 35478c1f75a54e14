"""A whole stream in one process: the main job without a cluster, and the oracle of `pipelines/`.

network = trained on the first task | trunk, head = cut at the freeze depth |
features of every task, computed once | one experience after the other | a Model
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import Config, StrategyName
from partialhn.data.datasets import open_stream
from partialhn.data.experience import Experience
from partialhn.features.extract import FeatureJob, feature_jobs, find_features, precompute
from partialhn.features.manifest import Manifest
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import Network, build_network
from partialhn.networks.head import Head, HeadStart, check_feature_size, head_start
from partialhn.networks.precision import configure_torch
from partialhn.networks.tensors import hash_tensors
from partialhn.networks.trunk import Trunk, check_depth, multiply_adds, split
from partialhn.strategies import STRATEGIES, Strategy
from partialhn.task_inference import TaskInference
from partialhn.training import lineage
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.lineage import lineage_ids_of
from partialhn.training.pretrain import fit_network, load_network
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.result import Clock, Outcome, result_fields
from partialhn.training.slots import Slot, needed_jobs, open_features, slots_of

Report = Callable[[EpochRecord | TaskRecord], None]


@dataclasses.dataclass(frozen=True)
class CutNetwork:
    """What every strategy of a stream has in common."""

    trunk: Trunk
    head: Head
    start: HeadStart
    """What the first head starts from."""
    macs: dict[str, float]
    """Multiply-adds of one image through trunk and head, and the trunk's share."""
    network: str
    """SHA-256 of the weights of the network that was cut, its own classifier aside."""

    def strategy(self, config: Config) -> Strategy:
        """A fresh strategy as configured, before its first task."""
        return STRATEGIES[config.train.strategy](self.head, self.start, config)


def cut_network(config: Config, network: Network) -> CutNetwork:
    """Cuts the network at the configured depth."""
    depth = config.backbone.freeze_depth
    trunk, stages = split(network, depth)
    size = config.data.input_size
    images_BCHW = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    z_BCHW = trunk(images_BCHW)
    below = multiply_adds(trunk, images_BCHW)
    above = multiply_adds(stages, z_BCHW) + network.width * 2
    return CutNetwork(trunk, Head(network, depth, config.hypernet.norm, config.hypernet.norm_groups,
                             config.train.precision),
                 head_start(network, depth, config.hypernet.norm, config.train.seed),
                 {"trunk": below, "head": above, "frozen_share": below / (below + above)},
                 hash_tensors({key: value for key, value in network.state_dict().items()
                               if not key.startswith("body.fc.")}))


def check(config: Config) -> None:
    """Refuses what cannot work before anything is read or trained. Raises: InputError."""
    network = build_network(config.backbone.backbone, 2)
    depth = config.backbone.freeze_depth
    check_depth(config.backbone.backbone, depth)
    check_feature_size(config.hypernet.norm, network, depth, config.data.input_size)
    Head(network, depth, config.hypernet.norm, config.hypernet.norm_groups)


def collect(store: FeatureStore, jobs: Sequence[FeatureJob], manifests: Sequence[Manifest],
            experiences: Sequence[Experience]) -> list[TaskFeatures]:
    """Opens the features of every task."""
    return open_features(store, slots_of(experiences, jobs, manifests))


def work_name(config: Config, experiences: Sequence[Experience]) -> str:
    """Names the work: equal for runs that learn the same thing from the same images."""
    parts = [config.work_hash(), *(each.name + each.fingerprint for each in experiences)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def run_stream(config: Config, root: Path,
               report: Report | None = None) -> tuple[Model, dict[str, Any]]:
    """Learns the configured stream below `root` in this process.

    Tasks that an earlier run learned there are not learned again. Returns the model and the
    fields of `result.json` that need no registry. `report` is called with every record as it
    comes.

    Raises: InputError for anything the user can set right.
    """
    check(config)
    clock = Clock()
    configure_torch(config.compute.threads)
    filesystem = pafs.LocalFileSystem()
    experiences = open_stream(config.data, root / "datasets")
    clock.lap("data")
    network = load_network(config, experiences[0], filesystem, str(root))
    if network is None:
        list(_each(fit_network(config, experiences[0], filesystem, str(root)), report))
        network = load_network(config, experiences[0], filesystem, str(root))
    assert network is not None
    clock.lap("trunk")
    cut = cut_network(config, network)
    store = FeatureStore(filesystem, str(root))
    lineage_ids = lineage_ids_of(config, cut.network, experiences)
    known = lineage.find(filesystem, f"{root}/learned", lineage_ids)
    first = 0 if config.train.needs_every_task else len(known)
    jobs = feature_jobs(config, experiences, cut.trunk)
    needed = needed_jobs(jobs, [each.name for each in experiences[:first]])
    _, decoded = precompute(store, cut.trunk, needed)
    there = find_features(store, jobs)
    slots = slots_of(experiences, jobs, [there.get(job.recipe.key) for job in jobs])
    tasks = open_features(store, slots, range(first, len(slots)))
    clock.lap("features")
    learner = Learner(cut.strategy(config), config.train, inference=TaskInference())
    if known:
        learner.restore(*lineage.state(filesystem, f"{root}/learned", known))
    for record in _each(learner.learn(tasks), report):
        if isinstance(record, TaskRecord):
            index = record.task_index
            done = lineage.Learned.of(Outcome.of(learner), lineage_ids, index)
            lineage.keep(_model(config, cut, learner, slots[:index + 1]), done, filesystem,
                       f"{root}/learned")
    outcomes: dict[str, Outcome] = {config.train.strategy: Outcome.of(learner)}
    for name in config.train.compare:
        baseline = Learner(cut.strategy(with_strategy(config, name)), config.train)
        list(_each(baseline.learn(tasks), report))
        outcomes[name] = Outcome.of(baseline)
    clock.lap("train")
    model = _model(config, cut, learner, slots)
    fields = result_fields(config, slots, cut.macs, decoded, outcomes, clock.laps)
    return model, fields | {"weights_hash": model.weights_hash()}


def _model(config: Config, cut: CutNetwork, learner: Learner, slots: Sequence[Slot]) -> Model:
    return Model(config, cut.trunk, learner.strategy,
                 tuple(TaskInfo(slot.name, slot.classes) for slot in slots),
                 inference=learner.inference)


def _each(records: Iterable[EpochRecord | TaskRecord],
          report: Report | None) -> Iterator[EpochRecord | TaskRecord]:
    for record in records:
        if report:
            report(record)
        yield record


def with_strategy(config: Config, name: StrategyName) -> Config:
    """The same configuration for another strategy."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, strategy=name,
                                                                 compare=()))
