"""The append-only history of a stream's aliases: who moved what from where to where, when and why.

    <root>/history/<stream>/00000001.json, 00000002.json, ...   one move each, never changed

MLflow keeps only where an alias points now. Here the move is written first and MLflow's alias is
set after it (`pipelines.registry.aliases`), so the history is the truth and a crash between the two
is mended by setting the alias again. An entry is created with a conditional write at the next free
number: of two writers one comes first and the other takes the number after it, so nothing is
overwritten and no number is left out. Knows no MLflow.
"""

import dataclasses
import getpass
import json
import re
import socket
import time
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from partialhn.errors import IntegrityError
from pipelines.platform.storage import Storage
from pipelines.settings import check_name

Kind = Literal["trained", "promoted", "rollback", "gate-rejected", "refresh", "reconcile"]
KINDS: tuple[str, ...] = typing.get_args(Kind)
ATTEMPTS = 1000
"""Numbers tried before giving up: so many writers would have to be faster in a row."""
_FILE = re.compile(r"(\d{8})\.json")


class StaleTokenError(RuntimeError):
    """A writer whose lease was lost, and taken by another, tries to write."""


@dataclasses.dataclass(frozen=True)
class Move:
    """An alias is to point to another version; the history adds number, time and `from`."""

    alias: str
    to: int | None
    """Version number; None takes the alias away."""
    kind: Kind
    why: str
    who: str = ""
    """Default: user@host of this process."""
    token: int | None = None
    """Fencing token of the lease under which this is written."""
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    decision: Mapping[str, Any] | None = None
    """The gate's decision and its numbers, as `pipelines.retrain.gate.Decision.fields` gives it."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One move as it was written."""

    seq: int
    time: str
    """UTC, ISO 8601."""
    registry: str
    """Which registered model the version numbers belong to: another database counts anew."""
    origin: int | None
    """The version the alias pointed to before; `from` in JSON."""
    move: Move

    def fields(self) -> dict[str, Any]:
        """The JSON of the entry's file."""
        move = self.move
        return {"seq": self.seq, "time": self.time, "who": move.who, "kind": move.kind,
                "alias": move.alias, "from": self.origin, "to": move.to, "why": move.why,
                "token": move.token, "metrics": dict(move.metrics),
                "decision": None if move.decision is None else dict(move.decision),
                "registry": self.registry}


class History:
    """The history of one stream. Entries never change, so each is read once."""

    def __init__(self, storage: Storage, stream: str) -> None:
        self._storage, self.stream = storage, check_name(stream)
        self.uri = storage.uri_of("history", stream)
        self._entries: list[Entry] = []

    def entries(self) -> list[Entry]:
        """All entries so far, oldest first.

        Raises: IntegrityError for an entry that is missing or damaged.
        """
        for seq in range(len(self._entries) + 1, self._last() + 1):
            self._entries.append(self._read(seq))
        return list(self._entries)

    def append(self, move: Move, registry: str) -> Entry | None:
        """Writes a move at the next free number; None where the alias points there already.

        Raises: StaleTokenError where an entry with a higher fencing token is there already.
        """
        move = dataclasses.replace(move, who=move.who or this_user())
        for _ in range(ATTEMPTS):
            there = self.entries()
            _check_token(move, there)
            if aliases(there).get(move.alias) == move.to:
                return None
            entry = Entry(len(there) + 1, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                          registry, aliases(there).get(move.alias), move)
            content = json.dumps(entry.fields(), indent=1).encode()
            if self._storage.put_if_absent(self._path(entry.seq), content):
                self._entries.append(entry)
                return entry
        raise RuntimeError(f"the history {self.uri} takes no entry: {ATTEMPTS} other writers were "
                           "faster; is a process writing without end?")

    def _path(self, seq: int) -> str:
        return self._storage.path("history", self.stream, f"{seq:08d}.json")

    def _last(self) -> int:
        """The highest number there is; 0 for an empty history."""
        numbers = [int(match[1])
                   for file in self._storage.list(self._storage.path("history", self.stream))
                   if (match := _FILE.fullmatch(file.path.rpartition("/")[2]))]
        return max(numbers, default=0)

    def _read(self, seq: int) -> Entry:
        where = f"{self.uri}/{seq:08d}.json"
        try:
            entry = parse_entry(json.loads(self._storage.read_text(self._path(seq))))
        except FileNotFoundError as error:
            raise IntegrityError(f"history entry {where} is missing, but later ones are "
                                 "there") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise IntegrityError(f"history entry {where} cannot be read: {error!r}") from error
        if entry.seq != seq:
            raise IntegrityError(f"history entry {where} says that it is number {entry.seq}")
        return entry


def aliases(entries: Sequence[Entry]) -> dict[str, int | None]:
    """Where every alias points after these entries; None: it was taken away."""
    return {entry.move.alias: entry.move.to for entry in entries}


def previous(entries: Sequence[Entry], alias: str) -> int | None:
    """The version an alias goes back to: the one before the current, rollbacks undone.

    After 1, 2, 3 and a rollback to 2 it is 1, not 3 again.
    """
    held: list[int] = []
    for entry in entries:
        to = entry.move.to
        if entry.move.alias != alias or to is None:
            continue
        if entry.move.kind == "rollback" and to in held:
            del held[held.index(to) + 1:]
        elif not held or held[-1] != to:
            held.append(to)
    return held[-2] if len(held) > 1 else None


def parse_entry(fields: Any) -> Entry:
    """The entry that `Entry.fields` and JSON made these fields of.

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
    except (OSError, KeyError):  # a container's user may have a number only
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _check_token(move: Move, there: Sequence[Entry]) -> None:
    if move.token is None:
        return
    newest = max((entry.move.token or 0 for entry in there), default=0)
    if move.token < newest:
        raise StaleTokenError(f"alias {move.alias!r} is not moved: this process writes with the "
                              f"fencing token {move.token} of a lease that was lost; the history "
                              f"has an entry with token {newest}. Start the same command again")
