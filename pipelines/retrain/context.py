"""The context of a retraining pass: a stream whose lease this process holds, and its folders."""

import dataclasses
from collections.abc import Sequence

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import Network
from partialhn.run import TrunkAndHead, cut_network
from partialhn.training import lineage
from partialhn.training.pretrain import configured_supply, stored_network
from partialhn.training.result import Clock
from pipelines.features.produce import open_store
from pipelines.platform.lease import Lease
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage
from pipelines.registry.client import Registry
from pipelines.retrain.journal import Decided, Journal, slots_of


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

    @property
    def folder(self) -> str:
        """Folder of the models after each task (`partialhn.training.lineage`)."""
        return self.storage.path("runs", self.stream, "learned")

    @property
    def store(self) -> FeatureStore:
        """The feature store."""
        return open_store(self.storage, self.config.compute)

    def hashes(self, fingerprint: str) -> str:
        """Path of the hashes of a task's images."""
        return hashes_path(self.storage, self.stream, fingerprint)

    def sample(self, lineage_id: str) -> str:
        """Path of the sample of a model: test images with its predictions."""
        return self.storage.path("streams", self.stream, "samples", f"{lineage_id}.parquet")

    def cut(self, base: Sequence[Decided]) -> TrunkAndHead:
        """The network of a stream's tasks, cut. Raises: InputError, as `cut_of`."""
        return cut_of(self.storage, self.stream, self.config, base)


def cut_of(storage: Storage, stream: str, config: Config,
           base: Sequence[Decided]) -> TrunkAndHead:
    """The network of a stream's tasks, cut; everything that a pass needs of these tasks is stored.

    Raises: InputError if the network, a model or test features of a task are missing, or if the
    supplied network is another one than that with which the tasks were learned.
    """
    store = open_store(storage, config.compute)
    learned = lineage.find(storage.filesystem, storage.path("runs", stream, "learned"),
                           [task.prefix for task in base])
    if len(learned) < len(base):
        raise InputError(f"the model after task {base[len(learned)].slot!r} is missing in "
                         f"{storage.uri_of('runs', stream, 'learned')}; allowed: the --storage "
                         "with which it was learned, or another --name")
    for slot in slots_of(base, store):
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


def hashes_path(storage: Storage, stream: str, fingerprint: str) -> str:
    """Path of the hashes of a task's images."""
    return storage.path("streams", stream, "images", f"{fingerprint[:32]}.parquet")
