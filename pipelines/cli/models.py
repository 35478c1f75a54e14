"""The commands `partialhn models ...`: registered versions, their aliases and their history."""

import dataclasses
import json
import sys
from functools import partial
from typing import Any, ClassVar

from partialhn.errors import InputError
from pipelines.settings import Group, RetrainConfig, check_name

REFUSED = 3
"""Exit code of a promotion that the gate's decision forbids."""


@dataclasses.dataclass(frozen=True)
class Where:
    """The options that choose a stream and its registry."""

    name: str = "stream"
    """Name of the stream."""
    storage: str = "partialhn-store"
    """The storage that train was given, with the history and the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    json: bool = False
    """Print JSON for machines."""

    def registry(self) -> Any:
        """Checks the stream's name and connects to the registry."""
        from pipelines.platform.storage import open_storage
        from pipelines.registry.client import connect

        check_name(self.name)
        return connect(open_storage(self.storage), self.tracking_uri, create=False)

    def show(self, found: Any, text: Any) -> None:
        """Prints a result as JSON, or as the text that the function `text` gives for it."""
        print(json.dumps(found, indent=1) if self.json else text(found))


@dataclasses.dataclass(frozen=True)
class List(Where):
    """List all versions of a stream with aliases, accuracies and the gate's decisions."""

    def run(self) -> None:
        from pipelines.cli.models_text import versions_text
        from pipelines.registry.models import overview

        self.show(overview(self.registry(), self.name), versions_text)


@dataclasses.dataclass(frozen=True)
class ShowVersion(Where):
    """Show one version: its facts, the gate's decision, and the aliases that it has had."""

    version: str = "champion"
    """Version number, or an alias: champion, challenger, task-TASK."""

    def run(self) -> None:
        from pipelines.cli.models_text import version_text
        from pipelines.registry.models import details

        self.show(details(self.registry(), self.name, self.version), version_text)


@dataclasses.dataclass(frozen=True)
class ShowHistory(Where):
    """Show every move of an alias: who moved it, when, from where to where, and why."""

    def run(self) -> None:
        from pipelines.cli.models_text import history_text
        from pipelines.registry.models import moves

        self.show(moves(self.registry(), self.name), history_text)


@dataclasses.dataclass(frozen=True)
class Promote(Where):
    """Make a version champion.

    Exit code 3 if the gate refused it; then --force and --why promote it anyway.
    """

    version: str = "challenger"
    """Version number, or an alias."""
    why: str = ""
    """Reason, for the history."""
    force: bool = False
    """Promote the version although the gate refused it."""

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
    """Move champion back to the version before, or to --to; the history records it as one move."""

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
    """Verify a version in a clean process: files, weights, signature, predictions of its sample."""

    version: str = "champion"
    """Version number, or an alias."""

    def run(self) -> int:
        from pipelines.registry.models import find
        from pipelines.registry.verify import verify

        registry = self.registry()
        version = find(registry, self.name, self.version)
        checks = verify(registry, version)
        passed = all(check.passed for check in checks)
        self.show({"stream": self.name, "version": version.version, "passed": passed,
                   "warnings": registry.aliases.differences(self.name),
                   "checks": [dataclasses.asdict(check) for check in checks]}, _checks_text)
        return 0 if passed else 1


def _checks_text(found: dict[str, Any]) -> str:
    return "\n".join([*(f"warning: {text}" for text in found["warnings"]),
                      f"{found['stream']} version {found['version']}: "
                      + ("as registered" if found["passed"] else "NOT as registered"),
                      *(f"  {'ok    ' if check['passed'] else 'FAILED'} {check['name']}: "
                        f"{check['found']}" for check in found["checks"])])


@dataclasses.dataclass(frozen=True)
class Repair(Where):
    """Set the aliases as the history says, and write a version's damaged files again.

    The files come from the learned models in the storage; only what was registered is written.
    """

    version: str = "champion"
    """Version number, or an alias."""

    def run(self) -> None:
        from pipelines.cli.models_text import repaired_text
        from pipelines.platform.storage import open_storage
        from pipelines.registry.models import repaired

        storage = open_storage(self.storage)
        self.show(repaired(self.registry(), storage, self.name, self.version), repaired_text)


@dataclasses.dataclass(frozen=True)
class ForgetTask(Where):
    """Make a version of the champion that does not know a task any more.

    The task's own parameters and its part of the detector go; what other tasks share with it stays
    and is listed. `retrain` does not learn the task again unless --learn-again names it, and a
    rollback brings it back. Exit code 3 if the gate refused the version.
    """

    task: str = ""
    """Name of the task."""
    why: str = ""
    """Reason, for the history, and for whoever asks for the task later."""
    policy: str | None = None
    """YAML file with the limits for new versions, as for retrain: max_loss_on_earlier_task counts
    for the tasks that stay."""
    dry_run: bool = False
    """Print what would be done, and what stays of the task, without doing it."""

    def run(self) -> int:
        from pipelines.retrain.forget import forget_task

        settings = RetrainConfig(self.name, self.storage, self.tracking_uri, self.policy,
                                 dry_run=self.dry_run)
        done = forget_task(settings, self.task, self.why,
                           partial(print, file=sys.stderr) if self.json else print)
        self.show(done.fields(), lambda _: "\n".join(done.lines()))
        return done.exit_code


@dataclasses.dataclass(frozen=True)
class Prune(Where):
    """Delete old versions, and the tensors that no other version needs; lists them first.

    Always kept: the champion, the version before it, the challenger, and versions with aliases
    that a person made. The learned models stay, so the stream goes on as before.
    """

    keep: int = 10
    """Number of newest versions to keep."""
    keep_aliases: bool = False
    """Keep every version with an alias, those of the tasks too."""
    delete: bool = False
    """Delete the versions instead of listing them."""

    def run(self) -> None:
        from partialhn.numbers import counted, size
        from pipelines.platform.storage import open_storage
        from pipelines.upkeep.prune_versions import Pruned, choose, prune

        if self.keep < 1:
            raise InputError(f"keep is {self.keep}; allowed: 1 or more")
        registry, storage = self.registry(), open_storage(self.storage)
        chosen = choose(registry, storage, self.name, self.keep, self.keep_aliases)
        done = (prune(registry, storage, self.name, chosen) if self.delete else
                [Pruned(f"{version.uri} (task {version.task!r})", 0) for version in chosen])
        rows = [dataclasses.asdict(each) for each in done]
        word = "deleted" if self.delete else "would be deleted"
        self.show({"stream": self.name, "deleted": self.delete, "versions": len(chosen),
                   "rows": rows}, lambda _: "\n".join([
                       *(f"{row['what']}  {word}" for row in rows),
                       f"{counted(len(chosen), 'version')} {word}"
                       + (f", {size(sum(row['bytes'] for row in rows))}" if self.delete
                          else "; to delete them, give --delete")]))


class Models(Group):
    """List, show, promote, roll back, verify, repair and prune versions; forget a task."""

    COMMANDS: ClassVar[dict[str, Any]] = {
        "list": List, "show": ShowVersion, "history": ShowHistory, "promote": Promote,
        "rollback": Rollback, "verify": Verify, "repair": Repair,
        "prune": Prune, "forget-task": ForgetTask}


COMMANDS: dict[str, Any] = {"models": Models}
