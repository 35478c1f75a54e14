"""The append-only history of a stream's aliases: who moved which alias, when, from where, and why.

    <root>/history/<stream>/00000001.json, 00000002.json, ...   one move each, never changed

MLflow records only the current version of an alias. Here the move is written first, and MLflow's
alias is set afterwards (`pipelines.registry.aliases`). So the history decides, and a crash between
the two is repaired by setting the alias again. An entry is created with a conditional write at the
next free number: of two writers, the slower one takes the number after it. So nothing is
overwritten and no number is missing. This file does not use MLflow.
"""

import dataclasses
import getpass
import json
import socket
import time
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from partialhn.errors import IntegrityError
from pipelines.platform.numbered import NumberedFiles
from pipelines.platform.storage import Storage
from pipelines.settings import check_name

Kind = Literal["trained", "promoted", "rollback", "gate-rejected", "refresh", "forgot",
               "reconcile"]
KINDS: tuple[str, ...] = typing.get_args(Kind)
ATTEMPTS = 1000
"""How many numbers a writer tries; other writers would have to be faster each time."""


class StaleTokenError(RuntimeError):
    """A process tried to write after another one had taken over its lease."""


@dataclasses.dataclass(frozen=True)
class Move:
    """A move of an alias to another version; the history adds number, time and `from`."""

    alias: str
    to: int | None
    """Version number; None removes the alias."""
    kind: Kind
    why: str
    who: str = ""
    """Who moved it; by default user@host of this process."""
    token: int | None = None
    """Fencing token of the lease under which this is written."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    decision: Mapping[str, Any] | None = None
    """The gate's decision and its numbers (`pipelines.gate.Decision.fields`)."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A move as it is stored in the history."""

    seq: int
    time: str
    """UTC, ISO 8601."""
    registry: str
    """Identifies the registered model of the version numbers; another database counts from 1."""
    origin: int | None
    """The version that the alias pointed to before; `from` in JSON."""
    move: Move

    def fields(self) -> dict[str, Any]:
        """The content of the entry's JSON file."""
        move = self.move
        return {"seq": self.seq, "time": self.time, "who": move.who, "kind": move.kind,
                "alias": move.alias, "from": self.origin, "to": move.to, "why": move.why,
                "token": move.token, "metrics": dict(move.metrics),
                "decision": None if move.decision is None else dict(move.decision),
                "registry": self.registry}


class History:
    """The history of one stream. Entries never change, so each is read only once."""

    def __init__(self, storage: Storage, stream: str) -> None:
        self._storage, self.stream = storage, check_name(stream)
        self.uri = storage.uri_of("history", stream)
        self._files = NumberedFiles(storage, storage.path("history", self.stream), self._read)

    def entries(self) -> list[Entry]:
        """All entries so far, oldest first.

        Raises: IntegrityError for an entry that is missing or damaged.
        """
        return self._files.items()

    def append(self, move: Move, registry: str) -> Entry | None:
        """Writes a move at the next free number; returns None if the alias points there already.

        Raises: StaleTokenError if there is an entry with a higher fencing token.
        """
        move = dataclasses.replace(move, who=move.who or this_user())
        for _ in range(ATTEMPTS):
            entries = self.entries()
            _check_token(move, entries)
            current = aliases(entries).get(move.alias)
            if current == move.to:
                return None
            entry = Entry(len(entries) + 1, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                          registry, current, move)
            content = json.dumps(entry.fields(), indent=1).encode()
            if self._files.put(entry.seq, entry, content):
                return entry
        raise RuntimeError(f"no entry could be added to the history {self.uri}: other writers were "
                           f"faster {ATTEMPTS} times; look for a process that keeps writing to it")

    def _read(self, seq: int) -> Entry:
        where = f"{self.uri}/{seq:08d}.json"
        try:
            entry = parse_entry(json.loads(self._storage.read_text(self._files.path(seq))))
        except FileNotFoundError as error:
            raise IntegrityError(f"history entry {where} is missing, but later ones "
                                 "exist") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IntegrityError(f"history entry {where} cannot be read: {error!r}") from error
        if entry.seq != seq:
            raise IntegrityError(f"history entry {where} holds seq {entry.seq}; expected {seq}")
        return entry


def aliases(entries: Sequence[Entry]) -> dict[str, int | None]:
    """The version of every alias after these entries; None for one that was removed."""
    return {entry.move.alias: entry.move.to for entry in entries}


def previous(entries: Sequence[Entry], alias: str) -> int | None:
    """The version that a rollback of the alias goes back to, or None if there is none.

    It is the version before the current one; a rollback removes later versions from the list. So
    after 1, 2, 3 and a rollback to 2 it is 1, not 3 again.
    """
    versions: list[int] = []
    for entry in entries:
        to = entry.move.to
        if entry.move.alias != alias or to is None:
            continue
        if entry.move.kind == "rollback" and to in versions:
            del versions[versions.index(to) + 1:]
        elif not versions or versions[-1] != to:
            versions.append(to)
    return versions[-2] if len(versions) > 1 else None


def parse_entry(fields: Any) -> Entry:
    """Rebuilds an entry from the fields that `Entry.fields` and JSON gave.

    Raises: KeyError, TypeError or ValueError for anything else.
    """
    if fields["kind"] not in KINDS:
        raise ValueError(f"kind is {fields['kind']!r}")
    for key, kinds in (("seq", (int,)), ("from", (int, type(None))), ("to", (int, type(None))),
                       ("token", (int, type(None))), ("alias", (str,)), ("time", (str,)),
                       ("who", (str,)), ("why", (str,)), ("metrics", (dict,)),
                       ("registry", (str,)), ("decision", (dict, type(None)))):
        if not isinstance(fields[key], kinds) or isinstance(fields[key], bool):
            raise TypeError(f"{key} is {fields[key]!r}")
    move = Move(fields["alias"], fields["to"], fields["kind"], fields["why"], fields["who"],
                fields["token"], fields["metrics"], fields["decision"])
    return Entry(fields["seq"], fields["time"], fields["registry"], fields["from"], move)


def this_user() -> str:
    """user@host of this process."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have only a number
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _check_token(move: Move, entries: Sequence[Entry]) -> None:
    if move.token is None:
        return
    newest = max((entry.move.token or 0 for entry in entries), default=0)
    if move.token < newest:
        raise StaleTokenError(f"alias {move.alias!r} is not moved, because another process has "
                              f"taken over the stream meanwhile (its lease is number {newest}, "
                              f"ours was {move.token}); start the same command again")
