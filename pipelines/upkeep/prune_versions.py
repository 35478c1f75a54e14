"""`partialhn models prune`: deletes registered versions that nobody needs any more.

Kept are the newest versions, the champion, the one that a rollback goes back to, the challenger and
every version with an alias that a person made; shared tensors stay as long as a kept version needs
them. The order is: alias, MLflow's version, its folder, shared tensors. So whatever a prune that is
killed leaves behind, no version lacks anything, and the next prune deletes the rest.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

from partialhn.checkpoints import FIELDS, shared
from partialhn.errors import InputError
from partialhn.json_files import parse_object
from pipelines.features.in_use import InUse, records
from pipelines.platform.lease import Lease
from pipelines.platform.storage import Storage
from pipelines.registry.client import Registry
from pipelines.registry.history import Move, previous
from pipelines.registry.versions import CHALLENGER, CHAMPION, Version, is_ours
from pipelines.retrain.journal import Journal

UNFINISHED_SECONDS = 24 * 3600.0
"""Files that no version refers to are kept until they are so many seconds old: a run uploads them
before it registers their version."""


@dataclasses.dataclass(frozen=True)
class Pruned:
    """One thing that was deleted, or would be."""

    what: str
    bytes: int


def choose(registry: Registry, storage: Storage, name: str, keep: int,
           keep_aliases: bool) -> list[Version]:
    """The versions to delete, oldest first.

    keep: number of newest versions to keep. keep_aliases: keep every version with an alias, those
    of the tasks too. Raises: InputError for a stream whose tasks are found by their versions.
    """
    versions = registry.versions(name)
    entries = registry.aliases.history(name).entries()
    back = previous(entries, CHAMPION)
    _check_log(storage, name, versions)
    kept = {version.version for version in versions[-keep:]} | {back}
    return [version for version in versions if version.version not in kept and not any(
        keep_aliases or alias in (CHAMPION, CHALLENGER) or not is_ours(alias)
        for alias in version.aliases)]


def prune(registry: Registry, storage: Storage, name: str,
          versions: Sequence[Version]) -> Iterator[Pruned]:
    """Deletes the versions, and shared tensors that no other version needs; yields each deletion.

    Raises: InputError if another process works on the stream.
    """
    lease = Lease(storage, name)
    if (holder := lease.acquire()) is not None:
        raise InputError(f"stream {name!r} is in use by {holder}; start the prune again when it "
                         "has ended")
    with lease, InUse(storage, "models prune", prunes=True) as record:
        record.add(["models"])  # a job that starts now waits until the prune has ended
        if jobs := [use for _, use in records(storage) if not use.prunes]:
            raise InputError(f"{storage.uri} is in use by {jobs[0]}; start the prune again when it "
                             "has ended")
        places = {place for version in registry.versions(name)
                  if (place := registry.shared_place(version)) is not None}
        for version in versions:
            lease.check()
            yield _delete(registry, storage, version, lease.token)
        for place in sorted(places):
            yield from _sweep(registry, storage, name, place)


def _check_log(storage: Storage, name: str, versions: Sequence[Version]) -> None:
    """Raises InputError unless the stream's log has the tasks of its champion."""
    logged = {task.prefix for task in Journal(storage, name).decided()}
    champion = next((each for each in versions if CHAMPION in each.aliases), None)
    if champion is not None and champion.tags["prefix"] not in logged:
        raise InputError(f"the tasks of stream {name!r} are found by their versions, because "
                         "`partialhn train` learned them; allowed: a stream that `partialhn "
                         "retrain` has taken over")


def _delete(registry: Registry, storage: Storage, version: Version, token: int) -> Pruned:
    """Deletes one version, after its aliases."""
    for alias in filter(is_ours, version.aliases):
        registry.aliases.move(version.stream, Move(
            alias, None, "reconcile", f"version {version.version} was pruned", token=token))
    folder = storage.path_of(registry.source_of(version))
    size = sum(file.size for file in storage.list(folder)) if folder else 0
    registry.delete_version(version)
    if folder:
        storage.delete(folder)
    return Pruned(f"{version.uri} (task {version.task!r})", size)


def _sweep(registry: Registry, storage: Storage, name: str, place: str) -> Iterator[Pruned]:
    """Deletes what no version refers to: folders of versions, and shared tensors."""
    sources = {path for version in registry.versions(name)
               if (path := storage.path_of(registry.source_of(version))) is not None}
    needed: set[str] = set()
    for source in sources:
        for file in storage.list(f"{source}/artifacts"):
            if file.path.endswith(f"/{FIELDS}"):
                needed |= set(shared.parts_of(parse_object(storage.read_bytes(file.path),
                                                           file.path)))
    old = storage.now() - UNFINISHED_SECONDS
    for folder in storage.folders(f"{place}/models"):
        path = f"{place}/models/{folder}/artifacts"
        files = list(storage.list(path))
        if path not in sources and files and max(file.modified for file in files) < old:
            storage.delete(f"{place}/models/{folder}")
            yield Pruned(f"{folder}, which no version refers to", sum(f.size for f in files))
    for file in list(storage.list(f"{place}/{shared.OBJECTS}")):
        sha256 = file.path.rpartition("/")[2].removesuffix(".safetensors")
        if sha256 not in needed:
            with contextlib.suppress(FileNotFoundError):
                storage.delete(file.path)
            yield Pruned(f"shared tensors {sha256[:12]}...", file.size)
