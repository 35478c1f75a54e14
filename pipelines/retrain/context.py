"""The context of a retraining pass: a stream whose lease this process holds, and its folders."""

import dataclasses

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.features.store import FeatureStore
from partialhn.networks.backbone import Network
from partialhn.networks.supplied import supplied_network
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

    def network(self, key: str) -> Network:
        """The stream's network: the stored one with this key, or for an empty key the supplied one.

        Raises: InputError if it cannot be found.
        """
        backbone = self.config.backbone
        network = (stored_network(self.config, key, self.storage.filesystem, self.storage.root)
                   if key else supplied_network(backbone.trunk, backbone.backbone, 2,
                                         self.config.data.input_size))
        if network is None:
            raise InputError(f"the stream's trunk {key} is not in {self.storage.uri}/trunks; "
                             "allowed: the --storage with which the stream was started")
        return network


def hashes_path(storage: Storage, stream: str, fingerprint: str) -> str:
    """Path of the hashes of a task's images."""
    return storage.path("streams", stream, "images", f"{fingerprint[:32]}.parquet")
