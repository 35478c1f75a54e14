"""Registered versions for people: listed, shown, promoted, rolled back; as dicts for text and JSON.

Every function reconciles aliases and history first (`pipelines.registry.aliases`).
"""

import dataclasses
import json
from typing import Any

from partialhn.data.experience import task_of
from partialhn.errors import InputError
from pipelines.registry.aliases import Repair
from pipelines.registry.client import Registry
from pipelines.registry.history import Entry, Move, previous
from pipelines.registry.versions import CHAMPION, Version, task_alias


class RefusedError(Exception):
    """The gate's stored decision stands against what was asked for."""


def overview(registry: Registry, name: str) -> dict[str, Any]:
    """All versions of a stream with their aliases, accuracies and the gate's word."""
    return {"stream": name, "repaired": _reconcile(registry, name),
            "versions": [version_fields(version) for version in registry.versions(name)]}


def details(registry: Registry, name: str, version: str) -> dict[str, Any]:
    """One version with all that is known of it, its decision and its moves."""
    repaired = _reconcile(registry, name)
    found = find(registry, name, version)
    moves = [entry.fields() for entry in registry.aliases.history(name).entries()
             if found.version in (entry.move.to, entry.origin)]
    return version_fields(found) | {
        "uri": found.uri, "run_id": found.run_id, "repaired": repaired,
        "work": found.tags["work"], "weights_hash": found.tags["weights_hash"],
        "classes": json.loads(found.tags["classes"]),
        "trunk_fingerprint": found.tags["trunk_fingerprint"], "storage": found.tags["storage"],
        "decision": found.decision, "history": moves}


def moves(registry: Registry, name: str) -> dict[str, Any]:
    """The whole history of a stream's aliases, oldest first."""
    repaired = _reconcile(registry, name)
    history = registry.aliases.history(name)
    return {"stream": name, "where": history.uri, "repaired": repaired,
            "entries": [entry.fields() for entry in history.entries()]}


def promote(registry: Registry, name: str, version: str, why: str, force: bool) -> dict[str, Any]:
    """Makes a version champion; its task's alias goes with it where the task has none yet.

    Raises: RefusedError where the gate refused the version, unless forced; InputError where it is
    forced without a reason.
    """
    if force and not why:
        raise InputError("force is given without a reason; allowed: --force --why TEXT, which the "
                         "history keeps")
    repaired = _reconcile(registry, name)
    found = find(registry, name, version)
    decision = found.decision
    if decision is not None and not decision["passed"] and not force:
        raise RefusedError(f"version {found.version} of {name!r} was refused by the gate:\n  "
                           + "\n  ".join(decision["reasons"])
                           + "\nTo promote it all the same: --force --why TEXT")
    move = Move(CHAMPION, found.version, "promoted", why or "asked for by hand",
                metrics=found.metrics, decision=decision)
    alias = task_alias(task_of(found.task))
    if not any(alias in other.aliases for other in registry.versions(name)):
        registry.aliases.move(name, dataclasses.replace(move, alias=alias))
    entry = registry.aliases.move(name, move)
    return _moved(registry, name, entry, repaired)


def roll_back(registry: Registry, name: str, to: str | None, why: str) -> dict[str, Any]:
    """Takes champion back to a version, or to the one before the current: one history entry.

    A rollback without `to` that was interrupted is completed and not made a second time.

    Raises: InputError where there is no earlier champion, or `to` was never champion.
    """
    mended = registry.aliases.reconcile(name)
    repaired = [str(repair) for repair in mended]
    if to is None and any(_is_rollback(repair) for repair in mended):
        return _moved(registry, name, None, repaired)
    entries = registry.aliases.history(name).entries()
    were = {entry.move.to for entry in entries
            if entry.move.alias == CHAMPION and entry.move.to is not None}
    if to is None:
        target = previous(entries, CHAMPION)
        if target is None:
            raise InputError(f"stream {name!r} has no earlier champion to go back to; partialhn "
                             f"models history --name {name} shows its moves")
    else:
        target = find(registry, name, to).version
        if target not in were:
            raise InputError(f"version {target} of {name!r} was never champion; allowed: "
                             + ", ".join(map(str, sorted(were)))
                             + ", or partialhn models promote")
    found = find(registry, name, str(target))
    entry = registry.aliases.move(name, Move(CHAMPION, target, "rollback",
                                             why or "asked for by hand", metrics=found.metrics))
    return _moved(registry, name, entry, repaired)


def find(registry: Registry, name: str, version: str) -> Version:
    """A version by its number or an alias. Raises: InputError listing what there is."""
    mark = "/" if version.isdecimal() else "@"
    return registry.resolve(f"models:/{name}{mark}{version}")


def version_fields(version: Version) -> dict[str, Any]:
    """One row of the list."""
    decision = version.decision
    return {"version": version.version, "task": version.task, "task_index": version.task_index,
            "aliases": list(version.aliases), **version.metrics,
            "gate": None if decision is None else "passed" if decision["passed"] else "failed",
            "reasons": [] if decision is None else list(decision["reasons"])}


def _moved(registry: Registry, name: str, entry: Entry | None,
           repaired: list[str]) -> dict[str, Any]:
    champion = find(registry, name, CHAMPION)
    return {"stream": name, "champion": champion.version, "task": champion.task,
            "repaired": repaired, "entry": None if entry is None else entry.fields()}


def _is_rollback(repair: Repair) -> bool:
    return repair.alias == CHAMPION and repair.entry.move.kind == "rollback"


def _reconcile(registry: Registry, name: str) -> list[str]:
    return [str(repair) for repair in registry.aliases.reconcile(name)]
