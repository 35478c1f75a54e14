"""Moving aliases: the history is written first, then MLflow's alias is set to what it says.

A process that dies between the two leaves an alias behind its history; `reconcile` mends that and
may run at any time, by several processes at once. Every move of this product goes through `move`.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from partialhn.errors import InputError
from pipelines.platform.storage import Storage
from pipelines.registry.history import Entry, History, Move, aliases
from pipelines.registry.versions import is_ours

if TYPE_CHECKING:
    from mlflow import MlflowClient

PLACE = "history"
"""Tag of a registered model: where its history is."""
ATTEMPTS = 100
REFUSALS = 5
"""How often a database may refuse the same write before it is an error."""


@dataclasses.dataclass(frozen=True)
class Repair:
    """An alias that was not where the history said."""

    alias: str
    found: int | None
    wanted: int | None
    entry: Entry
    """The entry that says so."""

    def __str__(self) -> str:
        move = self.entry.move
        if move.kind == "reconcile":
            return f"alias {self.alias}: {move.why} (history entry {self.entry.seq})"
        return (f"alias {self.alias} pointed to {_version(self.found)}; history entry "
                f"{self.entry.seq} ({move.kind}) says {_version(self.wanted)}: set")


class Aliases:
    """The aliases of a registry's streams, and their histories below one storage."""

    def __init__(self, client: "MlflowClient", storage: Storage) -> None:
        self._client, self._storage = client, storage
        self._histories: dict[str, History] = {}

    def history(self, stream: str) -> History:
        """The history of a registered stream.

        Raises: InputError where the stream keeps its history elsewhere, or the history found
        belongs to another registry.
        """
        return self._open(self._model(stream))

    def keeps_history(self, stream: str) -> bool:
        """Whether the stream is registered and has its history below this storage."""
        model = self._find(stream)
        return model is not None and model.tags.get(PLACE) == self._history(stream).uri

    def move(self, stream: str, move: Move) -> Entry | None:
        """Moves an alias; None where it points there already.

        Raises: StaleTokenError for a writer that lost its lease; InputError as `history` does.
        """
        model = self._model(stream)
        history = self._open(model)
        if PLACE not in model.tags:
            _contended(self._client.set_registered_model_tag, stream, PLACE, history.uri)
        entry = history.append(move, _identity(model))
        if entry is not None or _place(model, move.alias) != move.to:
            self._settle(stream, move.alias)
        return entry

    def reconcile(self, stream: str) -> list[Repair]:
        """Sets MLflow's aliases to what the history says; returns what was not right.

        An alias older than the history is taken over into it. One whose version was deleted from
        MLflow is taken away.
        """
        model = self._find(stream)
        if model is None:
            return []
        found = {alias: int(version) for alias, version in model.aliases.items() if is_ours(alias)}
        wanted = aliases(self._open(model).entries())
        repairs = []
        for alias in sorted(found.keys() | wanted.keys()):
            have, want = found.get(alias), wanted.get(alias)
            if alias not in wanted:
                self.move(stream, Move(alias, have, "reconcile",
                                       f"{_version(have)} was there before the history"))
            elif have == want:
                continue
            elif want is not None and not self._exists(stream, want):
                self.move(stream, Move(alias, None, "reconcile",
                                       f"{_version(want)} is not in the registry any more"))
            else:
                self._settle(stream, alias)
            repairs.append(Repair(alias, have, want, self._newest(stream, alias)))
        return repairs

    def _settle(self, stream: str, alias: str) -> None:
        """Sets one alias to what the history says, again where that went on meanwhile.

        Every writer sets the alias after its entry, so the last one to set it finds no newer entry.
        """
        want = self._wanted(stream, alias)
        for _ in range(ATTEMPTS):
            if want is None:
                _contended(self._client.delete_registered_model_alias, stream, alias)
            else:
                _contended(self._client.set_registered_model_alias, stream, alias, str(want))
            done, want = want, self._wanted(stream, alias)
            if done == want:
                return
        raise RuntimeError(f"alias {alias!r} of {stream!r} does not stay where it is set: its "
                           f"history went on {ATTEMPTS} times; is a process writing without end?")

    def _wanted(self, stream: str, alias: str) -> int | None:
        return aliases(self._history(stream).entries()).get(alias)

    def _newest(self, stream: str, alias: str) -> Entry:
        return next(entry for entry in reversed(self._history(stream).entries())
                    if entry.move.alias == alias)

    def _history(self, stream: str) -> History:
        if stream not in self._histories:
            self._histories[stream] = History(self._storage, stream)
        return self._histories[stream]

    def _open(self, model: Any) -> History:
        history = self._history(model.name)
        place = model.tags.get(PLACE, history.uri)
        if place != history.uri:
            raise InputError(f"stream {model.name!r} keeps its history in {place}, not in "
                             f"{history.uri}; allowed: the --storage it was trained with")
        for entry in history.entries():
            if entry.registry != _identity(model):
                raise InputError(
                    f"{history.uri} is the history of a stream {model.name!r} in another "
                    "registry; allowed: the --tracking-uri it was trained with, another --name, "
                    "or move that folder away to begin anew")
        return history

    def _find(self, stream: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(stream)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _model(self, stream: str) -> Any:
        model = self._find(stream)
        if model is None:
            raise InputError(f"no stream {stream!r} in the registry")
        return model

    def _exists(self, stream: str, version: int) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_model_version(stream, str(version))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True


def _contended(write: Callable[..., Any], *arguments: str) -> None:
    """Writes a tag or an alias, again where the database refused it.

    MLflow looks for a row and inserts it in two steps: of two clients that set one for the first
    time, PostgreSQL refuses the second, which then finds the row there and updates it.
    """
    from mlflow.exceptions import MlflowException

    for left in reversed(range(REFUSALS)):
        try:
            write(*arguments)
            return
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not left:
                raise


def _place(model: Any, alias: str) -> int | None:
    """Where MLflow's alias points."""
    return int(model.aliases[alias]) if alias in model.aliases else None


def _identity(model: Any) -> str:
    """Tells a registered model from one of the same name in another registry."""
    return str(model.creation_timestamp)


def _version(number: int | None) -> str:
    return "no version" if number is None else f"version {number}"
