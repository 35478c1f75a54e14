"""`partialhn models`: registered versions, who moved their aliases, and moving them."""

import dataclasses
import json
import sys
from typing import Any, ClassVar

from pipelines.settings import Group, check_name

REFUSED = 3
"""Exit code where the gate's decision stands against what was asked for."""


@dataclasses.dataclass(frozen=True)
class Where:
    """Which registry."""

    name: str = "stream"
    """Name of the stream."""
    storage: str = "partialhn-store"
    """The storage that train was given; it holds the history, and finds the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    json: bool = False
    """Print JSON for machines."""

    def registry(self) -> Any:
        """Connects; the stream's name is checked first."""
        from pipelines.platform.storage import open_storage
        from pipelines.registry.client import connect

        check_name(self.name)
        return connect(open_storage(self.storage), self.tracking_uri, create=False)

    def show(self, found: Any, text: Any) -> None:
        """Prints JSON, or what `text` makes of it."""
        print(json.dumps(found, indent=1) if self.json else text(found))


@dataclasses.dataclass(frozen=True)
class List(Where):
    """List all versions of a stream with aliases, accuracies and the gate's word."""

    def run(self) -> None:
        from pipelines.cli.models_text import versions_text
        from pipelines.registry.models import overview

        self.show(overview(self.registry(), self.name), versions_text)


@dataclasses.dataclass(frozen=True)
class ShowVersion(Where):
    """Show one version: what it is, what the gate decided, which aliases it had."""

    version: str = "champion"
    """Version number, or an alias: champion, challenger, task-TASK."""

    def run(self) -> None:
        from pipelines.cli.models_text import version_text
        from pipelines.registry.models import details

        self.show(details(self.registry(), self.name, self.version), version_text)


@dataclasses.dataclass(frozen=True)
class ShowHistory(Where):
    """Show who moved which alias when, from where to where, and why."""

    def run(self) -> None:
        from pipelines.cli.models_text import history_text
        from pipelines.registry.models import moves

        self.show(moves(self.registry(), self.name), history_text)


@dataclasses.dataclass(frozen=True)
class Promote(Where):
    """Make a version champion. One that the gate refused needs --force and --why (exit code 3)."""

    version: str = "challenger"
    """Version number, or an alias."""
    why: str = ""
    """Reason, for the history."""
    force: bool = False
    """Promote although the gate refused it."""

    def run(self) -> int:
        from pipelines.cli.models_text import moved_text
        from pipelines.registry.models import RefusedError, promote

        try:
            found = promote(self.registry(), self.name, self.version, self.why, self.force)
        except RefusedError as error:
            print(f"refused: {error}", file=sys.stderr)
            return REFUSED
        self.show(found, moved_text)
        return 0


@dataclasses.dataclass(frozen=True)
class Rollback(Where):
    """Take champion back to the version before, or to --to; one step, and itself in the history."""

    to: str | None = None
    """Version number of an earlier champion; default: the one before the current."""
    why: str = ""
    """Reason, for the history."""

    def run(self) -> None:
        from pipelines.cli.models_text import moved_text
        from pipelines.registry.models import roll_back

        self.show(roll_back(self.registry(), self.name, self.to, self.why), moved_text)


@dataclasses.dataclass(frozen=True)
class Verify(Where):
    """Check a version in a clean process: files, weights hash, signature, answers on its sample."""

    version: str = "champion"
    """Version number, or an alias."""

    def run(self) -> int:
        from pipelines.registry.models import find
        from pipelines.registry.verify import verify

        registry = self.registry()
        registry.aliases.reconcile(self.name)
        version = find(registry, self.name, self.version)
        checks = verify(registry, version)
        passed = all(check.passed for check in checks)
        self.show({"stream": self.name, "version": version.version, "passed": passed,
                   "checks": [dataclasses.asdict(check) for check in checks]}, _checks_text)
        return 0 if passed else 1


def _checks_text(found: dict[str, Any]) -> str:
    return "\n".join([f"{found['stream']} version {found['version']}: "
                      + ("as registered" if found["passed"] else "NOT as registered"),
                      *(f"  {'ok    ' if check['passed'] else 'FAILED'} {check['name']}: "
                        f"{check['found']}" for check in found["checks"])])


class Models(Group):
    """Look at registered versions, move their aliases, and see who did."""

    COMMANDS: ClassVar[dict[str, Any]] = {
        "list": List, "show": ShowVersion, "history": ShowHistory, "promote": Promote,
        "rollback": Rollback, "verify": Verify}


COMMANDS: dict[str, Any] = {"models": Models}
