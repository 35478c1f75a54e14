"""A stream whose lease this process holds: everything that a pass works with, and where it is."""

import dataclasses

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import Network, supplied_network
from partialhn.training.pretrain import stored_network
from partialhn.training.result import Clock
from pipelines.features.produce import open_store
from pipelines.platform.lease import Lease
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage
from pipelines.registry.client import Registry
from pipelines.retrain.journal import Journal


@dataclasses.dataclass(frozen=True)
class PassContext:
    """One stream during one pass."""

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
        """Where the models after each task are (`partialhn.training.lineage`)."""
        return self.storage.path("runs", self.stream, "learned")

    @property
    def store(self) -> FeatureStore:
        """The stored features."""
        return open_store(self.storage, self.config.compute)

    def hashes(self, fingerprint: str) -> str:
        """Where the hashes of a task's images are kept."""
        return hashes_path(self.storage, self.stream, fingerprint)

    def sample(self, lineage_id: str) -> str:
        """Where the sample of a model is kept, until it is registered and after."""
        return self.storage.path("streams", self.stream, "samples", f"{lineage_id}.parquet")

    def network(self, key: str) -> Network:
        """The network that the stream was founded with; no key: the supplied one."""
        backbone = self.config.backbone
        network = (stored_network(self.config, key, self.storage.filesystem, self.storage.root)
                   if key else supplied_network(backbone.trunk, backbone.backbone, 2))
        if network is None:
            raise InputError(f"the stream's trunk {key} is not at {self.storage.uri}/trunks; "
                             "allowed: the --storage that the stream was founded in")
        return network


def hashes_path(storage: Storage, stream: str, fingerprint: str) -> str:
    """Where the hashes of a task's images are kept."""
    return storage.path("streams", stream, "images", f"{fingerprint[:32]}.parquet")
