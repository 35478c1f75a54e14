"""A whole stream in one process: the main job without a cluster, and the oracle of `pipelines/`.

network = trained on the first task | trunk, head = cut at the freeze depth |
features of every task, computed once | one experience after the other | a Model
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from partialhn.backbone import (
    Network,
    Trunk,
    build_network,
    check_depth,
    multiply_adds,
    split,
)
from partialhn.checkpoint import Model, TaskInfo
from partialhn.config import Config, StrategyName
from partialhn.datasets import open_stream
from partialhn.featurise import (
    FeatureJob,
    Split,
    commit_features,
    compute_shard,
    feature_jobs,
    feature_shape,
)
from partialhn.model import Head, HeadStart, check_feature_size, head_start
from partialhn.pretrain import fit_network, load_network
from partialhn.result import Clock, Outcome, result_fields
from partialhn.store import FeatureSet, FeatureStore, Manifest
from partialhn.strategies import STRATEGIES, Strategy
from partialhn.stream import Experience
from partialhn.task_inference import TaskInference
from partialhn.train import EpochRecord, Learner, TaskFeatures, TaskRecord

Report = Callable[[EpochRecord | TaskRecord], None]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What every strategy of a stream has in common."""

    trunk: Trunk
    head: Head
    start: HeadStart
    """What the first head starts from."""
    macs: dict[str, float]
    """Multiply-adds of one image through trunk and head, and the trunk's share."""

    def strategy(self, config: Config) -> Strategy:
        """A fresh strategy as configured, before its first task."""
        return STRATEGIES[config.train.strategy](self.head, self.start, config)


def cut(config: Config, network: Network) -> Parts:
    """Cuts the network at the configured depth."""
    depth = config.backbone.freeze_depth
    trunk, stages = split(network, depth)
    size = config.data.input_size
    images_BCHW = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    z_BCHW = trunk(images_BCHW)
    below = multiply_adds(trunk, images_BCHW)
    above = multiply_adds(stages, z_BCHW) + network.width * 2
    return Parts(trunk, Head(network, depth, config.hypernet.norm, config.hypernet.norm_groups),
                 head_start(network, depth, config.hypernet.norm, config.train.seed),
                 {"trunk": below, "head": above, "frozen_share": below / (below + above)})


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
    sets: dict[tuple[str, Split], FeatureSet] = {
        (job.task, job.split): store.open(manifest)
        for job, manifest in zip(jobs, manifests, strict=True)}
    return [TaskFeatures(experience.name, len(experience.classes), sets[experience.name, "train"],
                         sets.get((experience.name, "validation")), sets[experience.name, "test"])
            for experience in experiences]


def work_name(config: Config, experiences: Sequence[Experience]) -> str:
    """Names the work: equal for runs that learn the same thing from the same images."""
    parts = [config.work_hash(), *(each.name + each.fingerprint for each in experiences)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def run_stream(config: Config, root: Path,
               report: Report | None = None) -> tuple[Model, dict[str, Any]]:
    """Learns the configured stream below `root` in this process.

    Returns the model and the fields of `result.json` that need no registry. `report` is called
    with every record as it comes.

    Raises: InputError for anything the user can set right.
    """
    check(config)
    clock = Clock()
    torch.set_num_threads(config.compute.threads or torch.get_num_threads())
    torch.set_flush_denormal(True)
    filesystem = pafs.LocalFileSystem()
    experiences = open_stream(config.data, root / "datasets")
    clock.lap("data")
    network = load_network(config, experiences[0], filesystem, str(root))
    if network is None:
        _each(fit_network(config, experiences[0], filesystem, str(root)), report)
        network = load_network(config, experiences[0], filesystem, str(root))
    assert network is not None
    clock.lap("trunk")
    parts = cut(config, network)
    store = FeatureStore(filesystem, str(root))
    jobs = feature_jobs(config, experiences, parts.trunk)
    manifests, decoded = _precompute(config, store, parts.trunk, jobs)
    tasks = collect(store, jobs, manifests, experiences)
    clock.lap("features")
    outcomes: dict[str, Outcome] = {}
    learned: dict[str, Learner] = {}
    for name in (config.train.strategy, *config.train.compare):
        learner = Learner(parts.strategy(with_strategy(config, name)), config.train,
                          inference=TaskInference() if name == config.train.strategy else None)
        _each(learner.learn(tasks), report)
        outcomes[name], learned[name] = Outcome.of(learner), learner
    clock.lap("train")
    ours = learned[config.train.strategy]
    model = Model(config, parts.trunk, ours.strategy,
                  tuple(TaskInfo(each.name, each.classes) for each in experiences),
                  inference=ours.inference)
    fields = result_fields(config, experiences, parts.macs, dict(zip(jobs, manifests, strict=True)),
                           decoded, outcomes, clock.laps)
    model.facts = {"accuracy_matrix": fields["accuracy_matrix"]}
    model.save(root / "models" / work_name(config, experiences))
    return model, fields | {"weights_hash": model.weights_hash()}


def _each(records: Iterable[EpochRecord | TaskRecord], report: Report | None) -> None:
    for record in records:
        if report:
            report(record)


def _precompute(config: Config, store: FeatureStore, trunk: Trunk,
                jobs: Sequence[FeatureJob]) -> tuple[list[Manifest], int]:
    size = config.data.input_size
    shape_CHW = feature_shape(trunk, torch.zeros(1, 3, size, size, dtype=torch.uint8))
    manifests, decoded = [], 0
    for job in jobs:
        manifest = store.find(job.recipe)
        if manifest is None:
            shards = [compute_shard(store, trunk, job, index) for index in range(job.shards)]
            manifest = commit_features(store, job, shards, shape_CHW)
            decoded += manifest.rows
        manifests.append(manifest)
    return manifests, decoded


def with_strategy(config: Config, name: StrategyName) -> Config:
    """The same configuration for another strategy."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, strategy=name,
                                                                 compare=()))
