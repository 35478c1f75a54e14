"""Takes a stream over that `train` began: its tasks enter the log with what is known of them.

The champion's versions name their lineage ids and their stored features, and the models after each
task hold the options and records. Their images are not needed, and their versions stay as they are.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from partialhn.checkpoints import checkpoint, shared
from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.features.jobs import SPLITS, Split
from partialhn.features.manifest import Manifest
from partialhn.training import lineage
from partialhn.training.pretrain import network_key_of
from pipelines.features.produce import open_store
from pipelines.platform.lease import Lease
from pipelines.platform.storage import Storage
from pipelines.registry.versions import Version
from pipelines.retrain.journal import Decided, Journal

NO_GATE: dict[str, Any] = {"passed": True, "reasons": [], "checks": [], "tasks": [], "policy": {}}
"""The decision on a task that no gate has seen."""


@dataclasses.dataclass(frozen=True)
class Adoption:
    """The champion's tasks that the log of its stream does not have, and their configuration."""

    config: Config
    tasks: tuple[Decided, ...] = ()

    def write(self, journal: Journal, lease: Lease) -> None:
        """Adds the tasks to the log; the champion's report is there already."""
        if not self.tasks:
            return
        if journal.config() is None:
            journal.append(lease, "founded", {"config": self.config.to_dict()})
        for task in self.tasks:
            journal.append(lease, "adopted", dataclasses.asdict(task))
        journal.append(lease, "published", {"prefix": self.tasks[-1].prefix})


def adoption(storage: Storage, stream: str, chain: Sequence[Version],
             logged: Sequence[Decided]) -> Adoption | None:
    """The champion's tasks that are not in the log yet; None if there are none.

    chain: the champion and the versions that it was learned from, oldest first.

    Raises: InputError if something is missing that the stream needs to go on.
    """
    known = {task.prefix for task in logged}
    missing = [version for version in chain if version.tags["prefix"] not in known]
    if not missing:
        return None
    folder = storage.path("runs", stream, "learned")
    fields = checkpoint.read_fields(storage.filesystem, f"{folder}/{missing[-1].tags['prefix']}")
    ids = [version.tags["prefix"] for version in chain]
    learned = lineage.find(storage.filesystem, folder, ids)
    if fields is None or len(learned) < len(chain) or learned[0].parent:
        raise InputError(
            f"stream {stream!r} cannot be continued: of the {chain[-1].task_index + 1} models up "
            f"to its champion (version {chain[-1].version}), {len(learned)} are stored in "
            f"{storage.uri_of('runs', stream, 'learned')} and registered; allowed: the --storage "
            "with which it was trained, another --name or, where versions were deleted in MLflow, "
            "first the same `partialhn train` again, which registers them again")
    config = Config.from_dict(fields["config"])
    config = dataclasses.replace(config, train=config.train.alone())
    network = logged[0].network if logged else _network_key(storage, config, chain[0])
    tasks = [_decided(storage, version, record, network)
             for version, record in zip(chain, learned, strict=True) if version in missing]
    return Adoption(config, tuple(tasks))


def _decided(storage: Storage, version: Version, learned: lineage.Learned,
             network: str) -> Decided:
    """The log's entry on a registered task."""
    manifests, record = _manifests(storage, version), learned.record
    seconds = sum(shard.seconds for manifest in manifests.values() for shard in manifest.shards)
    size = shared.added_bytes(storage.filesystem,
                              storage.path("runs", version.stream, "learned"), learned.prefix,
                              learned.parent)
    return Decided(
        record.task, version.classes, "", manifests["test"].recipe.transform,
        {split: dataclasses.asdict(manifest.recipe) for split, manifest in manifests.items()},
        "", "", learned.prefix, learned.parent, network, NO_GATE | {"task": record.task},
        {"features": round(seconds, 3), "train": round(record.train_seconds, 3),
         "evaluate": round(record.evaluate_seconds, 3)},
        {"features": sum(manifest.bytes for manifest in manifests.values()), "model": size,
         "task": learned.task_bytes}, "", adopted=True)


def _manifests(storage: Storage, version: Version) -> dict[Split, Manifest]:
    """A version's stored features by split; its keys stand in the order of the splits.

    Raises: InputError if its test features are gone, which every pass needs.
    """
    keys, store = version.feature_keys, open_store(storage)
    splits: tuple[Split, ...] = (SPLITS if len(keys) == len(SPLITS) else
                                 ("train", "test") if len(keys) == 2 else ("test",))
    manifests: dict[Split, Manifest] = {}
    for split, key in zip(splits, keys[-len(splits):], strict=True):
        if (manifest := store.manifest(key)) is not None:
            manifests[split] = manifest
    if "test" not in manifests:
        raise InputError(f"the stored test features of task {version.task!r} ({version.uri}) are "
                         f"missing in {storage.uri_of('features')}; every pass measures every "
                         "task, so start the same `partialhn train` again, which computes them")
    return manifests


def _network_key(storage: Storage, config: Config, first: Version) -> str:
    """The key of the stored network of a stream; empty for a supplied one."""
    if not config.backbone.trains_trunk:
        return ""
    manifests = _manifests(storage, first)
    if "train" not in manifests:
        raise InputError(f"the stored training features of task {first.task!r} ({first.uri}) are "
                         "missing, which name the trunk of the stream; start the same `partialhn "
                         "train` again, which computes them")
    recipe = manifests["train"].recipe
    return network_key_of(config, recipe.data, recipe.transform, len(first.classes))
