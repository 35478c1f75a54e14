"""`partialhn features`: light, so that `--help` answers at once."""

import dataclasses
from typing import Any, ClassVar

from tyro.conf import Positional

from pipelines.settings import Group, OutputConfig


@dataclasses.dataclass(frozen=True)
class ListFeatures:
    """List what the feature store holds, and what it takes."""

    storage: str = OutputConfig.storage
    """The storage that train was given."""

    def run(self) -> int:
        from pipelines.feature_admin import listing
        from pipelines.storage import open_storage

        print("\n".join(listing(open_storage(self.storage))))
        return 0


@dataclasses.dataclass(frozen=True)
class ShowFeatures:
    """Show how one set of features was made, and each of its shards."""

    key: Positional[str]
    """Key as `features list` prints it; its first characters will do."""
    storage: str = OutputConfig.storage
    """The storage that train was given."""

    def run(self) -> int:
        from pipelines.feature_admin import description
        from pipelines.storage import open_storage

        print("\n".join(description(open_storage(self.storage), self.key)))
        return 0


@dataclasses.dataclass(frozen=True)
class VerifyFeatures:
    """Read every byte of the stored features again; exit code 1 where something is damaged."""

    key: str | None = None
    """Only this key; its first characters will do."""
    storage: str = OutputConfig.storage
    """The storage that train was given."""

    def run(self) -> int:
        from pipelines.feature_admin import verify
        from pipelines.storage import open_storage

        damaged = 0
        for line, good in verify(open_storage(self.storage), self.key):
            print(line)
            damaged += not good
        return 1 if damaged else 0


class Features(Group):
    """Look at the stored features and check them."""

    COMMANDS: ClassVar[dict[str, Any]] = {"list": ListFeatures, "show": ShowFeatures,
                                          "verify": VerifyFeatures}


COMMANDS: dict[str, Any] = {"features": Features}
