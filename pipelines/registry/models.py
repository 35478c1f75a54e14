"""The operations of `partialhn models`: list, show, promote and roll back registered versions.

They return dicts, for text and JSON. Those that move an alias first reconcile the aliases with the
history (`pipelines.registry.aliases`) and check the files of the version that they move to. Those
that only read change nothing: `warnings` says which alias differs from the history.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from partialhn.data.experience import newest_slots, task_of
from partialhn.errors import InputError
from pipelines.platform.storage import Storage
from pipelines.registry.aliases import Repair
from pipelines.registry.client import Registry
from pipelines.registry.history import Entry, Move, previous
from pipelines.registry.versions import CHAMPION, Version, task_alias


class RefusedError(Exception):
    """A promotion is refused because the gate refused the version."""


def overview(registry: Registry, name: str) -> dict[str, Any]:
    """All versions of a stream with their aliases, accuracies and the gate's decisions."""
    return {"stream": name, **_as_found(registry, name),
            "versions": [version_fields(version) for version in registry.versions(name)]}


def details(registry: Registry, name: str, version: str) -> dict[str, Any]:
    """All stored facts about one version, with the gate's decision and its alias moves."""
    shown = find(registry, name, version)
    moves = [entry.fields() for entry in registry.aliases.history(name).entries()
             if shown.version in (entry.move.to, entry.origin)]
    return version_fields(shown) | {
        "uri": shown.uri, "run_id": shown.run_id, **_as_found(registry, name),
        "work": shown.tags["work"], "weights_hash": shown.tags["weights_hash"],
        "classes": json.loads(shown.tags["classes"]),
        "trunk_fingerprint": shown.tags["trunk_fingerprint"], "storage": shown.tags["storage"],
        "forgotten": [str(gone) for gone in shown.forgotten],
        "without_task_id": shown.without_task_id, "decision": shown.decision, "history": moves}


def moves(registry: Registry, name: str) -> dict[str, Any]:
    """The whole history of a stream's aliases, oldest first."""
    history = registry.aliases.history(name)
    return {"stream": name, "where": history.uri, **_as_found(registry, name),
            "entries": [entry.fields() for entry in history.entries()]}


def promote(registry: Registry, name: str, version: str, why: str, force: bool) -> dict[str, Any]:
    """Makes a version champion; it also gets its task's alias if no version has that alias yet.

    Tasks that it knows, and that were forgotten since, get their aliases back.

    Raises: RefusedError if the gate refused the version, unless `force`; InputError for `force`
    without `why`; IntegrityError if the version's files are damaged.
    """
    if force and not why:
        raise InputError("force is given without a reason; allowed: --force --why TEXT (the "
                         "history keeps the text)")
    before = registry.holder(name, CHAMPION)
    repaired = _reconcile(registry, name)
    candidate = find(registry, name, version)
    decision = candidate.decision
    if decision is not None and not decision["passed"] and not force:
        raise RefusedError(f"version {candidate.version} of {name!r} was refused by the gate:\n  "
                           + "\n  ".join(decision["reasons"])
                           + "\nTo promote it anyway, give --force --why TEXT")
    registry.require_sound(candidate)
    move = Move(CHAMPION, candidate.version, "promoted", why or "promoted by hand",
                metrics=candidate.metrics, decision=decision)
    _bring_back_aliases(registry, registry.aliases.history(name).entries(), candidate, move)
    alias = task_alias(task_of(candidate.task))
    if registry.holder(name, alias) is None:
        registry.aliases.move(name, dataclasses.replace(move, alias=alias))
    entry = registry.aliases.move(name, move)
    return _moved(registry, name, entry, repaired, before)


def roll_back(registry: Registry, name: str, to: str | None, why: str) -> dict[str, Any]:
    """Moves champion back to version `to`, or else to the champion before; one history entry.

    Without `to`, an interrupted rollback is completed and not repeated.

    Raises: InputError if there is no earlier champion, or `to` was never champion; IntegrityError
    if the version's files are damaged.
    """
    before = registry.holder(name, CHAMPION)
    repairs = registry.aliases.reconcile(name)
    repaired = [str(repair) for repair in repairs]
    if to is None and any(_is_rollback(repair) for repair in repairs):
        return _moved(registry, name, None, repaired, before)
    entries = registry.aliases.history(name).entries()
    champions = {entry.move.to for entry in entries
                 if entry.move.alias == CHAMPION and entry.move.to is not None}
    if to is None:
        target = previous(entries, CHAMPION)
        if target is None:
            raise InputError(f"stream {name!r} has no earlier champion to go back to; to see all "
                             f"moves: partialhn models history --name {name}")
    else:
        target = find(registry, name, to).version
        if target not in champions:
            raise InputError(f"version {target} of {name!r} was never champion; allowed: "
                             + ", ".join(map(str, sorted(champions)))
                             + ", or partialhn models promote")
    version = find(registry, name, str(target))
    registry.require_sound(version)
    move = Move(CHAMPION, target, "rollback", why or "rolled back by hand",
                metrics=version.metrics)
    _bring_back_aliases(registry, entries, version, move)
    return _moved(registry, name, registry.aliases.move(name, move), repaired, before)


def _bring_back_aliases(registry: Registry, entries: Sequence[Entry], version: Version,
                        move: Move) -> None:
    """Gives the aliases of tasks back that a later version has forgotten, and this one knows."""
    last = {entry.move.alias: entry for entry in entries}
    forgotten = {alias: entry.origin for alias, entry in last.items()
                 if entry.move.kind == "forgot" and entry.move.to is None}
    if not forgotten:  # the version's tasks stand in its files
        return
    known = {task_alias(task) for task in newest_slots(registry.slots_of(version) or ())}
    for alias, origin in forgotten.items():
        if alias in known:
            registry.aliases.move(version.stream,
                                  dataclasses.replace(move, alias=alias, to=origin))


def repaired(registry: Registry, storage: Storage, name: str, version: str) -> dict[str, Any]:
    """Sets the aliases as the history says, and writes the damaged files of a version again."""
    from pipelines.registry.repair import repair  # imports torch, which takes seconds

    aliases = _reconcile(registry, name)
    found = find(registry, name, version)
    lines = [*aliases, *repair(registry, storage, found)]
    registry.require_sound(found)
    return {"stream": name, "version": found.version, "repaired": lines}


def find(registry: Registry, name: str, version: str) -> Version:
    """A version by its number or an alias. Raises: InputError listing versions and aliases."""
    mark = "/" if version.isdecimal() else "@"
    return registry.resolve(f"models:/{name}{mark}{version}")


def version_fields(version: Version) -> dict[str, Any]:
    """The fields of a version in the list of versions."""
    decision = version.decision
    return {"version": version.version, "task": version.task, "task_index": version.task_index,
            "aliases": list(version.aliases), **version.metrics,
            "gate": None if decision is None else "passed" if decision["passed"] else "failed",
            "reasons": [] if decision is None else list(decision["reasons"])}


def _moved(registry: Registry, name: str, entry: Entry | None, repaired: list[str],
           before: Version | None) -> dict[str, Any]:
    champion = find(registry, name, CHAMPION)
    return {"stream": name, "champion": champion.version, "task": champion.task,
            **_differences(registry, before, champion), "repaired": repaired,
            "entry": None if entry is None else entry.fields()}


def _differences(registry: Registry, before: Version | None, champion: Version) -> dict[str, Any]:
    """The tasks of which only the champion before, or only the new one, knows; none where the files
    of one of them, which say its tasks, cannot be read.
    """
    was, now = (registry.slots_of(version) if version else None for version in (before, champion))
    if was is None or now is None:
        was, now = [], []
    was, now = (list(newest_slots(slots)) for slots in (was, now))
    return {"before": before and before.version,
            "tasks_lost": [task for task in was if task not in now],
            "tasks_gained": [task for task in now if task not in was]}


def _is_rollback(repair: Repair) -> bool:
    return repair.alias == CHAMPION and repair.entry.move.kind == "rollback"


def _as_found(registry: Registry, name: str) -> dict[str, Any]:
    """What a command that only reads says about the aliases; it repairs none."""
    return {"repaired": [], "warnings": registry.aliases.differences(name)}


def _reconcile(registry: Registry, name: str) -> list[str]:
    return [str(repair) for repair in registry.aliases.reconcile(name)]
