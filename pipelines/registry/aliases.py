"""Moving aliases: first the history entry is written, then MLflow's alias is set to match it.

If a process dies between the two, the alias differs from the history; `reconcile` repairs that.
It may run at any time, in several processes at once. This project moves aliases only by `move`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partialhn.errors import InputError
from pipelines.platform.storage import Storage
from pipelines.registry.connection import Connection
from pipelines.registry.history import Entry, History, Move, aliases
from pipelines.registry.reading import RegisteredModel
from pipelines.registry.versions import CHAMPION, is_ours
from pipelines.settings import mask_password

PLACE = "history"
"""Tag of a registered model that holds the URI of its history."""
BY_HAND = ("rollback", "promoted")
"""The kinds of moves that only a person makes."""
ATTEMPTS = 100
"""How often an alias is set again because its history has changed meanwhile."""
REFUSALS = 5
"""How often a write is tried before the database's refusal is an error."""


@dataclasses.dataclass(frozen=True)
class Repair:
    """The repair of an alias that differed from the history."""

    alias: str
    found: int | None
    """Version that the alias pointed to; None for none."""
    wanted: int | None
    """Version that the alias should point to; None for none."""
    entry: Entry
    """The history entry that determines it."""

    def __str__(self) -> str:
        move = self.entry.move
        if move.kind == "reconcile":
            return f"alias {self.alias}: {move.why} (history entry {self.entry.seq})"
        return (f"alias {self.alias} pointed to {_version(self.found)}; it was set to "
                f"{_version(self.wanted)} as in history entry {self.entry.seq} ({move.kind})")


def unknown_stream(stream: str, connection: Connection) -> InputError:
    """The error for a stream that the registry does not have; it lists those it has."""
    names = ", ".join(sorted(model.name for model in connection.reader.models()))
    return InputError(
        f"stream is {stream!r}, which is not in the registry {mask_password(connection.uri)}; "
        + (f"allowed: --name with one of {names}" if names else
           "allowed: none yet; `partialhn train` or `partialhn retrain` registers one"))


class Aliases:
    """The aliases of all streams of a registry, with their histories in one storage."""

    def __init__(self, connection: Connection, storage: Storage) -> None:
        self._connection, self._storage = connection, storage
        self._histories: dict[str, History] = {}

    def history(self, stream: str) -> History:
        """The history of a registered stream.

        Raises: InputError if its history is in another storage, or if the history here belongs to
        another registry.
        """
        return self._open(self._model(stream))

    def check(self, stream: str) -> None:
        """Checks, before anything is changed, that a stream can be registered here.

        Raises: InputError if it has its history in another storage, if the history here belongs to
        another registry, or if the registered model of the history has another name now.
        """
        model = self._find(stream)
        if model is not None:
            self._open(model)
            return
        entries = self._history(stream).entries()
        if entries:
            raise InputError(self._lost(stream, entries[-1]))

    def is_registered(self, stream: str) -> bool:
        """Whether there is a registered model of this name."""
        return self._find(stream) is not None

    def moved_by_hand(self, stream: str) -> bool:
        """Whether the last move of the champion was a person's."""
        history = self.history(stream).entries()
        return any(entry.move.alias == CHAMPION for entry in history) and (
            self.last_move(stream, CHAMPION).kind in BY_HAND)

    def last_move(self, stream: str, alias: str) -> Move:
        """The newest move of an alias that has been moved."""
        return self._newest(stream, alias).move

    def keeps_history(self, stream: str) -> bool:
        """Whether the stream is registered and has its history in this storage."""
        model = self._find(stream)
        return model is not None and model.tags.get(PLACE) == self._history(stream).uri

    def require_place(self, stream: str) -> None:
        """Raises InputError where the local storage of a stream's history is not there any more."""
        model = self._find(stream)
        place = "" if model is None else model.tags.get(PLACE, "")
        root = place.removesuffix(f"/history/{stream}")
        here = self._storage.uri
        if root.startswith("/") and root != here and not Path(root).exists():
            raise InputError(f"stream {stream!r} was registered in the storage {root}, which is "
                             "not there, and the registry knows files by their whole paths; "
                             f"allowed: that storage in its place; where it is {here} now, "
                             f"ln -s {here} {root} and --storage {root}")

    def move(self, stream: str, move: Move) -> Entry | None:
        """Moves an alias; returns its history entry, or None if it points there already.

        Raises: StaleTokenError if the writer has lost its lease; InputError, as `history`.
        """
        model = self._model(stream)
        history = self._open(model)
        if PLACE not in model.tags:
            _contended(self._connection.client.set_registered_model_tag, stream, PLACE, history.uri)
        entry = history.append(move, _identity(model))
        if entry is not None or model.aliases.get(move.alias) != move.to:
            self._set_from_history(stream, move.alias)
        return entry

    def reconcile(self, stream: str) -> list[Repair]:
        """Sets MLflow's aliases to match the history; returns the repairs.

        An alias that is older than the history is added to the history. An alias whose version was
        deleted from MLflow is removed.
        """
        repairs = []
        for alias, have, want, is_known in self._differing(stream):
            if not is_known:
                self.move(stream, Move(alias, have, "reconcile",
                                       f"{_version(have)} had the alias before the history began"))
            elif want is not None and not self._exists(stream, want):
                self.move(stream, Move(alias, None, "reconcile",
                                       f"{_version(want)} is no longer in the registry"))
            else:
                self._set_from_history(stream, alias)
            repairs.append(Repair(alias, have, want, self._newest(stream, alias)))
        return repairs

    def differences(self, stream: str, only: str | None = None) -> list[str]:
        """A line for each alias, or for `only` this one, that differs from the history; changes
        nothing.
        """
        return [f"alias {alias} points to {_version(have)} in MLflow, and the history says "
                f"{_version(want)}; to set it: partialhn models repair --name {stream}"
                for alias, have, want, is_known in self._differing(stream)
                if is_known and only in (None, alias)]

    def _differing(self, stream: str) -> list[tuple[str, int | None, int | None, bool]]:
        """Every alias that differs from the history, with the versions there and in the history.

        The last value says whether the history knows the alias.
        """
        model = self._find(stream)
        if model is None:
            return []
        current = {alias: version for alias, version in model.aliases.items()
                   if is_ours(alias)}
        wanted = aliases(self._open(model).entries())
        return [(alias, current.get(alias), wanted.get(alias), alias in wanted)
                for alias in sorted(current.keys() | wanted.keys())
                if alias not in wanted or current.get(alias) != wanted[alias]]

    def _set_from_history(self, stream: str, alias: str) -> None:
        """Sets one alias to match the history; again if the history has changed meanwhile.

        Every writer sets the alias after its entry, so the last one to set it finds no newer entry.
        """
        want = self._wanted(stream, alias)
        client = self._connection.client
        for _ in range(ATTEMPTS):
            if want is None:
                _contended(client.delete_registered_model_alias, stream, alias)
            else:
                _contended(client.set_registered_model_alias, stream, alias, str(want))
            was_set_to, want = want, self._wanted(stream, alias)
            if was_set_to == want:
                return
        raise RuntimeError(f"alias {alias!r} of {stream!r} cannot be set: its history changed "
                           f"{ATTEMPTS} times meanwhile; look for a process that keeps writing to "
                           "it")

    def _wanted(self, stream: str, alias: str) -> int | None:
        return aliases(self._history(stream).entries()).get(alias)

    def _newest(self, stream: str, alias: str) -> Entry:
        return next(entry for entry in reversed(self._history(stream).entries())
                    if entry.move.alias == alias)

    def _history(self, stream: str) -> History:
        if stream not in self._histories:
            self._histories[stream] = History(self._storage, stream)
        return self._histories[stream]

    def _open(self, model: RegisteredModel) -> History:
        history = self._history(model.name)
        place = model.tags.get(PLACE, history.uri)
        name = place.rpartition("/")[2]
        if name != model.name:
            raise InputError(f"the registered model {model.name!r} was named {name!r} when its "
                             f"history in {place} began; allowed: rename it back to {name!r} in "
                             "MLflow")
        if place != history.uri:
            self.require_place(model.name)
            raise InputError(f"stream {model.name!r} has its history in {place}, not in "
                             f"{history.uri}; allowed: the --storage it was trained with")
        for entry in history.entries():
            if entry.registry != _identity(model):
                raise InputError(
                    f"{history.uri} is the history of another registered model {model.name!r}, in "
                    "another registry or from before it was renamed or deleted; allowed: the "
                    "--tracking-uri it was trained with, or another --name")
        return history

    def _lost(self, stream: str, entry: Entry) -> str:
        """The message about a history whose registered model is not in this registry by its name.

        A model that was renamed keeps its time of creation, which the history entries hold.
        """
        renamed = [model.name for model in self._connection.reader.models()
                   if _identity(model) == entry.registry]
        where = self._history(stream).uri
        if renamed:
            return (f"the registered model {stream!r} is named {renamed[0]!r} in MLflow now, and "
                    f"its history in {where} has the name {stream!r}; allowed: --name with a new "
                    f"name, or rename {renamed[0]!r} back to {stream!r} in MLflow")
        return (f"{where} is the history of a registered model {stream!r} that is not in this "
                "registry; allowed: the --tracking-uri with which it was registered, another "
                "--name or, if the model was deleted, to delete that folder")

    def _find(self, stream: str) -> RegisteredModel | None:
        return self._connection.reader.model(stream)

    def _model(self, stream: str) -> RegisteredModel:
        model = self._find(stream)
        if model is None:
            raise unknown_stream(stream, self._connection)
        return model

    def _exists(self, stream: str, version: int) -> bool:
        return self._connection.reader.version(stream, version) is not None


def _contended(write: Callable[..., Any], *arguments: str) -> None:
    """Writes a tag or an alias; tries again if the database refuses it.

    MLflow searches for a row and inserts it in two steps. If two clients set the same one for the
    first time, PostgreSQL refuses the second; at its next try the row exists and is updated.
    """
    from mlflow.exceptions import MlflowException

    for attempts_left in reversed(range(REFUSALS)):
        try:
            write(*arguments)
            return
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not attempts_left:
                raise


def _identity(model: RegisteredModel) -> str:
    """Distinguishes a registered model from one of the same name in another registry."""
    return str(model.creation_timestamp)


def _version(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"
