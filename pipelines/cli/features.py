"""The commands `partialhn features ...`. Imports nothing heavy, so that `--help` is fast."""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from tyro.conf import Positional

from partialhn.config import Config, FeatureSections
from partialhn.errors import InputError
from pipelines.settings import Group, OutputConfig

if TYPE_CHECKING:
    from pipelines.platform.storage import Storage


def _storage(uri: str) -> "Storage":
    """Opens a storage. Raises: InputError with the reason, if it cannot be read."""
    from pipelines.platform.storage import open_storage

    storage = open_storage(uri)
    storage.check(write=False)
    return storage


@dataclasses.dataclass(frozen=True)
class ListFeatures:
    """List the stored features: their state, size and age, and what needs them."""

    storage: str = OutputConfig.storage
    """The storage that train was given."""
    tracking_uri: str | None = OutputConfig.tracking_uri
    """MLflow server or database, as for train; its versions need features."""

    def run(self) -> int:
        from pipelines.registry.client import connect
        from pipelines.upkeep.inspect import listing
        from pipelines.upkeep.references import references

        storage = _storage(self.storage)
        registry = None
        try:
            registry = connect(storage, self.tracking_uri, create=False)
        except InputError as error:
            print(f"which features registered versions need is unknown: {error}")
        with storage.explained():
            print("\n".join(listing(storage, references(storage, registry),
                                    versions_known=registry is not None)))
        return 0


@dataclasses.dataclass(frozen=True)
class ShowFeatures:
    """Show how one set of features was computed, and each of its shards."""

    key: Positional[str]
    """Key as `features list` prints it, or its first characters."""
    storage: str = OutputConfig.storage
    """The storage that train was given."""

    def run(self) -> int:
        from pipelines.upkeep.inspect import description

        storage = _storage(self.storage)
        with storage.explained():
            print("\n".join(description(storage, self.key)))
        return 0


@dataclasses.dataclass(frozen=True)
class VerifyFeatures:
    """Read every byte of the stored features again; exit code 1 if anything is damaged."""

    key: str | None = None
    """Only this key; its first characters are enough."""
    storage: str = OutputConfig.storage
    """The storage that train was given."""

    def run(self) -> int:
        from pipelines.upkeep.inspect import verify

        storage, damaged = _storage(self.storage), 0
        with storage.explained():
            for line, good in verify(storage, self.key):
                print(line)
                damaged += not good
        if damaged:
            print("to have damaged features computed again, delete their folder in "
                  f"{storage.uri_of('features')}: the next command that needs them computes them")
        return 1 if damaged else 0


@dataclasses.dataclass(frozen=True)
class PruneFeatures:
    """Delete features that no registered version, no stream's log and no running job needs.

    Without --delete it only lists them. Deleted features are computed again when a command needs
    them. Unfinished sets are deleted only if they are more than a day old.
    """

    storage: str = OutputConfig.storage
    """The storage that train was given."""
    tracking_uri: str | None = OutputConfig.tracking_uri
    """MLflow server or database with every version that was learned from this storage."""
    older_than: str | None = None
    """Only features older than this: 30d, 12h, 2w, 90min."""
    unreferenced: bool = False
    """All features that nothing needs, of any age."""
    no_registry: bool = False
    """Do not ask a registry, because no model was ever registered from this storage."""
    delete: bool = False
    """Delete the features instead of listing them."""

    def run(self) -> int:
        from partialhn.numbers import size
        from pipelines.registry.client import connect
        from pipelines.upkeep.prune import age_text, delete, parse_age, prunable, stored
        from pipelines.upkeep.references import check_registry, references

        if self.older_than is None and not self.unreferenced:
            raise InputError("neither --older-than nor --unreferenced is given; allowed: one of "
                             "them, or both")
        age = parse_age(self.older_than) if self.older_than is not None else 0.0
        storage = _storage(self.storage)
        registry = None if self.no_registry else connect(storage, self.tracking_uri, create=False)
        check_registry(storage, registry)
        with storage.explained():
            unused = prunable(stored(storage), references(storage, registry), age)
            results = delete(storage, unused) if self.delete else ((each, []) for each in unused)
            total = count = 0
            for features, users in results:
                what = (f"kept, in use by {users[0]}" if users else
                        "deleted" if self.delete else "would be deleted")
                print(f"{features.key}  {size(features.bytes)}  "
                      f"{age_text(features.age)} old  {what}")
                total, count = total + features.bytes * (not users), count + (not users)
        print(f"{count} set{'s' * (count != 1)} of features, {size(total)} "
              + ("deleted" if self.delete else "would be deleted; to delete them, give --delete"))
        return 0


@dataclasses.dataclass(frozen=True)
class PlanFeatures(FeatureSections):
    """Estimate the size of stored features at every freeze depth, and when they pay; store none.

    --config FILE and --preset NAME as for train.
    """

    storage: str = OutputConfig.storage
    """Storage for data sets that come from a library."""

    def run(self) -> int:
        from partialhn.features.cost import described, plan
        from partialhn.features.extract import feature_jobs
        from partialhn.networks.backbone import build_network
        from partialhn.networks.cut import CutNetwork
        from partialhn.run import check, with_depth_number
        from pipelines.execution.open_data import open_data

        storage, config = _storage(self.storage), with_depth_number(Config.of(self))
        network = build_network(config.backbone.backbone, 2,
                                input_size=config.data.input_size).eval()
        check(config, network)
        depths = range(len(network.blocks()) + 1)
        trunk = CutNetwork.of(network, depths[-1]).trunk
        with storage.explained():
            experiences = open_data(config.data, storage)
            plans = plan(feature_jobs(config, experiences, trunk, depths), trunk)
        if not plans:
            raise InputError(f"data is {self.data.data!r}, but none of the images tried can be "
                             "read; allowed: PNG, JPEG and other image files")
        print("\n".join(described(plans)))
        return 0


class Features(Group):
    """List, show, verify, plan and prune the stored features."""

    COMMANDS: ClassVar[dict[str, Any]] = {"list": ListFeatures, "show": ShowFeatures,
                                          "verify": VerifyFeatures, "plan": PlanFeatures,
                                          "prune": PruneFeatures}


COMMANDS: dict[str, Any] = {"features": Features}
