"""The context of a retraining pass: a stream whose lease this process holds, and its folders."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from partialhn.checkpoints.model import Model
from partialhn.checkpoints.shared import stored_bytes
from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import Network
from partialhn.run import TrunkAndHead, cut_network
from partialhn.training import lineage
from partialhn.training.pretrain import configured_supply, stored_network
from partialhn.training.result import Clock
from partialhn.training.slots import Slot
from pipelines.features.produce import open_store
from pipelines.platform.lease import Lease
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage
from pipelines.registry.client import Registry
from pipelines.retrain.chapters import Chapters
from pipelines.retrain.journal import Decided, Journal, slots_of
from pipelines.retrain.seen import Seen, hashes_path


@dataclasses.dataclass(frozen=True)
class PassContext:
    """The settings, stores and connections of one pass over a stream."""

    storage: Storage
    stream: str
    config: Config
    registry: Registry
    journal: Journal
    lease: Lease
    progress: Progress
    clock: Clock
    seen: Seen = dataclasses.field(default_factory=Seen)

    @property
    def folder(self) -> str:
        """Folder of the models after each task (`partialhn.training.lineage`)."""
        return self.storage.path("runs", self.stream, "learned")

    @property
    def store(self) -> FeatureStore:
        """The feature store."""
        return open_store(self.storage, self.config.compute)

    @property
    def chapters(self) -> Chapters:
        """The files that hold many learned tasks in short."""
        return Chapters(self.storage, self.stream)

    def hashes(self, fingerprint: str) -> str:
        """Path of the hashes of a task's images."""
        return self.storage.path(hashes_path(self.stream, fingerprint))

    def sample(self, lineage_id: str) -> str:
        """Path of the sample of a model: test images with its predictions."""
        return self.storage.path("streams", self.stream, "samples", f"{lineage_id}.parquet")

    def cut(self, base: Sequence[Decided]) -> TrunkAndHead:
        """The network of a stream's tasks, cut. Raises: InputError, as `cut_of`."""
        if self.seen.cut is None:
            self.chapters.recall(base, self.seen)
            self.seen.cut = cut_of(self.storage, self.stream, self.config, base, self.seen)
        return self.seen.cut

    def slots(self, base: Sequence[Decided]) -> list[Slot]:
        """The slots of decided tasks, with those of their features that are stored."""
        return _slots(base, self.store, self.seen)

    def learned(self, base: Sequence[Decided]) -> list[lineage.Learned]:
        """The records of decided tasks, from the first up to the first that is not stored."""
        return lineage.find(self.storage.filesystem, self.folder, [task.prefix for task in base],
                            self.seen.learned)

    def model(self, lineage_id: str) -> tuple[Model, int]:
        """The model after a task, and the bytes of its files.

        Raises: IntegrityError if it is not stored, or damaged.
        """
        if self.seen.model is None or self.seen.model[0] != lineage_id:
            self.seen.model = None  # two models need not be in memory at once
            with tempfile.TemporaryDirectory() as scratch:
                copy = lineage.fetch_model(self.storage.filesystem, self.folder, lineage_id,
                                           Path(scratch) / "model")
                self.seen.model = lineage_id, Model.load(copy), stored_bytes(copy)
        return self.seen.model[1:]


def _slots(base: Sequence[Decided], store: FeatureStore, seen: Seen) -> list[Slot]:
    new = [task for task in base if task.prefix not in seen.slots]
    seen.slots |= {task.prefix: slot for task, slot in zip(new, slots_of(new, store), strict=True)}
    return [seen.slots[task.prefix] for task in base]


def cut_of(storage: Storage, stream: str, config: Config, base: Sequence[Decided],
           seen: Seen | None = None) -> TrunkAndHead:
    """The network of a stream's tasks, cut; everything that a pass needs of these tasks is stored.

    seen: gets what is read.

    Raises: InputError if the network, a model or test features of a task are missing, or if the
    supplied network is another one than that with which the tasks were learned.
    """
    store, seen = open_store(storage, config.compute), seen or Seen()
    learned = lineage.find(storage.filesystem, storage.path("runs", stream, "learned"),
                           [task.prefix for task in base], seen.learned)
    if len(learned) < len(base):
        raise InputError(f"the model after task {base[len(learned)].slot!r} is missing in "
                         f"{storage.uri_of('runs', stream, 'learned')}; allowed: the --storage "
                         "with which it was learned, or another --name")
    for slot in _slots(base, store, seen):
        if "test" not in slot.manifests:
            raise InputError(f"the stored test features of task {slot.name!r} are missing in "
                             f"{storage.uri}/features; every pass measures every task, so restore "
                             "them or start a new stream with another --name")
    cut = cut_network(config, network_of(storage, config, base[0].network))
    learned_with = base[-1].recipes["test"]["trunk"]
    if cut.trunk.fingerprint() != learned_with:
        raise InputError(
            f"the trunk is {cut.trunk.fingerprint()[:12]}, but the tasks of the stream were "
            f"learned on {learned_with[:12]}; allowed: the same weights in backbone.trunk "
            f"({config.backbone.trunk!r}), or another --name")
    return cut


def network_of(storage: Storage, config: Config, key: str) -> Network:
    """The stream's network: the stored one with this key, or for an empty key the supplied one.

    Raises: InputError if it cannot be found.
    """
    network = (stored_network(config, key, storage.filesystem, storage.root) if key
               else configured_supply(config))
    if network is None:
        raise InputError(f"the stream's trunk {key} is not in {storage.uri}/trunks; "
                         "allowed: the --storage with which the stream was started")
    return network
