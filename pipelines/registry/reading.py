"""What the registry knows of models, versions and runs; read without changing anything.

MLflow takes seconds to import, so a SQLite registry is read directly: `SqliteReader` asks the
tables of MLflow's schema for what `ClientReader` asks MLflow's client. It is used only where the
tables have the expected columns; every other registry is read through the client.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pipelines.registry.versions import Version

if TYPE_CHECKING:
    from mlflow import MlflowClient

OURS = "task_index"
"""A tag that every version of this project has."""
PARENT_RUN = "mlflow.parentRunId"
_COLUMNS = {"registered_models": ("name", "creation_time"),
            "registered_model_tags": ("name", "key", "value"),
            "registered_model_aliases": ("name", "alias", "version"),
            "model_versions": ("name", "version", "run_id", "source", "storage_location",
                               "current_stage"),
            "model_version_tags": ("name", "version", "key", "value"),
            "runs": ("run_uuid", "artifact_uri"), "tags": ("run_uuid", "key", "value")}
_WORKSPACE = "default"
"""MLflow's workspace of all models, where its tables have such a column."""
_DELETED = "Deleted_Internal"
"""The stage that MLflow gives a deleted version, whose row stays."""
_WAIT = 30.0
"""Seconds to wait for a writer that holds the database."""


class RegisteredModel(NamedTuple):
    """One registered model, without its versions."""

    name: str
    creation_timestamp: int
    tags: Mapping[str, str]
    aliases: Mapping[str, int]


class Reader(Protocol):
    """Read access to a registry."""

    def model(self, name: str) -> RegisteredModel | None:
        """The registered model of this name, or None."""

    def models(self) -> list[RegisteredModel]:
        """All registered models."""

    def versions(self, name: str, lineage_id: str | None = None) -> list[Version]:
        """The versions that this project registered, oldest first; those of one lineage id."""

    def version(self, name: str, number: int) -> Version | None:
        """One version, whoever registered it; None if there is none."""

    def source(self, version: Version) -> str:
        """URI of the version's files."""

    def parent_run(self, run_id: str) -> str:
        """ID of the run that a run belongs to."""

    def artifacts_of(self, run_id: str) -> str:
        """URI of a run's artifacts."""


class ClientReader:
    """Reads through MLflow's client, from a server or from any database."""

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client

    def model(self, name: str) -> RegisteredModel | None:
        found = _unless_missing(lambda: self._client.get_registered_model(name))
        return None if found is None else _model(found)

    def models(self) -> list[RegisteredModel]:
        return [_model(found) for found in pages(self._client.search_registered_models)]

    def versions(self, name: str, lineage_id: str | None = None) -> list[Version]:
        model = self.model(name)
        aliases_of = _by_version({} if model is None else model.aliases)
        where = f"name = '{name}'" + (f" and tags.prefix = '{lineage_id}'" if lineage_id else "")
        found = [_version(record, aliases_of.get(int(record.version), []))
                 for record in pages(self._client.search_model_versions, where)
                 if OURS in record.tags]
        return sorted(found, key=lambda version: version.version)

    def version(self, name: str, number: int) -> Version | None:
        found = _unless_missing(lambda: self._client.get_model_version(name, str(number)))
        return None if found is None else _version(found, found.aliases)

    def source(self, version: Version) -> str:
        return str(self._client.get_model_version_download_uri(version.stream,
                                                               str(version.version)))

    def parent_run(self, run_id: str) -> str:
        return str(self._client.get_run(run_id).data.tags[PARENT_RUN])

    def artifacts_of(self, run_id: str) -> str:
        return str(self._client.get_run(run_id).info.artifact_uri)


class SqliteReader:
    """Reads the tables of MLflow in a SQLite file. Make one with `sqlite_reader`."""

    def __init__(self, database: Path, has_workspaces: Mapping[str, bool]) -> None:
        self._database, self._has_workspaces = database, has_workspaces

    def model(self, name: str) -> RegisteredModel | None:
        return next(iter(self._models(name)), None)

    def models(self) -> list[RegisteredModel]:
        return self._models(None)

    def versions(self, name: str, lineage_id: str | None = None) -> list[Version]:
        with _opened(self._database) as database:
            wanted = None if lineage_id is None else {
                number for (number,) in database.execute(
                    f"SELECT version FROM {self._of('model_version_tags')} AND name = ? "
                    "AND key = 'prefix' AND value = ?", (name, lineage_id))}
            return [version for version in self._versions(database, name, wanted)
                    if OURS in version.tags]

    def version(self, name: str, number: int) -> Version | None:
        with _opened(self._database) as database:
            return next(iter(self._versions(database, name, {number})), None)

    def source(self, version: Version) -> str:
        with _opened(self._database) as database:
            stored, given = database.execute(
                f"SELECT storage_location, source FROM {self._of('model_versions')} AND name = ? "
                "AND version = ?", (version.stream, version.version)).fetchone()
        return str(stored or given)

    def parent_run(self, run_id: str) -> str:
        return self._one("SELECT value FROM tags WHERE run_uuid = ? AND key = ?", run_id,
                         PARENT_RUN)

    def artifacts_of(self, run_id: str) -> str:
        return self._one("SELECT artifact_uri FROM runs WHERE run_uuid = ?", run_id)

    def _one(self, query: str, *values: str) -> str:
        with _opened(self._database) as database:
            return str(database.execute(query, values).fetchone()[0])

    def _models(self, name: str | None) -> list[RegisteredModel]:
        where, values = ("", ()) if name is None else (" AND name = ?", (name,))
        with _opened(self._database) as database:
            def rows(table: str, columns: str) -> list[tuple[Any, ...]]:
                return database.execute(
                    f"SELECT {columns} FROM {self._of(table)}{where} ORDER BY name",
                    values).fetchall()

            models = [RegisteredModel(model, created, {}, {})
                      for model, created in rows("registered_models", "name, creation_time")]
            by_name = {model.name: (dict[str, str](), dict[str, int]()) for model in models}
            for model, key, value in rows("registered_model_tags", "name, key, value"):
                by_name[model][0][key] = value
            for model, alias, number in rows("registered_model_aliases", "name, alias, version"):
                by_name[model][1][alias] = int(number)
        return [model._replace(tags=by_name[model.name][0], aliases=by_name[model.name][1])
                for model in models]

    def _versions(self, database: sqlite3.Connection, name: str,
                  numbers: set[int] | None) -> Iterator[Version]:
        """The versions that are not deleted, oldest first: all, or those of some numbers."""
        one = "" if numbers is None else f" AND version IN ({', '.join(map(str, numbers))})"
        tags: dict[int, dict[str, str]] = {}
        for number, key, value in database.execute(
                f"SELECT version, key, value FROM {self._of('model_version_tags')} "
                f"AND name = ?{one}", (name,)):
            tags.setdefault(number, {})[key] = value
        aliases_of = _by_version(dict(database.execute(
            f"SELECT alias, version FROM {self._of('registered_model_aliases')} AND name = ?{one}",
            (name,)).fetchall()))
        for number, run_id in database.execute(
                f"SELECT version, run_id FROM {self._of('model_versions')} AND name = ? "
                f"AND current_stage != ?{one} ORDER BY version", (name, _DELETED)):
            yield Version(name, number, run_id or "", tuple(sorted(aliases_of.get(number, []))),
                          tags.get(number, {}))

    def _of(self, table: str) -> str:
        """A table, and the start of a condition on its rows."""
        where = f"workspace = '{_WORKSPACE}'" if self._has_workspaces[table] else "1"
        return f"{table} WHERE {where}"


def sqlite_reader(database: Path) -> SqliteReader | None:
    """A reader of MLflow's tables; None if they are not as expected, or another workspace than
    the default one is chosen.
    """
    if any(name.startswith("MLFLOW") and "WORKSPACE" in name for name in os.environ):
        return None
    try:
        with _opened(database) as opened:
            columns = {table: {row[1] for row in opened.execute(f"PRAGMA table_info({table})")}
                       for table in _COLUMNS}
    except sqlite3.Error:
        return None  # MLflow's client says what is wrong
    if any(not columns[table].issuperset(names) for table, names in _COLUMNS.items()):
        return None
    return SqliteReader(database, {table: "workspace" in found
                                   for table, found in columns.items()})


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that creates no file. Writing is allowed, because the next one who opens a
    database takes back what a killed writer left half done.
    """
    connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=rw", uri=True, timeout=_WAIT)
    try:
        yield connection
    finally:
        connection.close()


def pages(search: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """All results of one of MLflow's search functions, page after page."""
    token = None
    while True:
        page = search(*arguments, page_token=token)
        yield from page
        if not (token := page.token):
            return


def _unless_missing(ask: Callable[[], Any]) -> Any:
    """The answer of MLflow; None for what does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _model(found: Any) -> RegisteredModel:
    return RegisteredModel(found.name, int(found.creation_timestamp), dict(found.tags),
                           {alias: int(number) for alias, number in found.aliases.items()})


def _version(record: Any, aliases: Sequence[str]) -> Version:
    return Version(record.name, int(record.version), record.run_id or "", tuple(sorted(aliases)),
                   dict(record.tags))


def _by_version(aliases: Mapping[str, int]) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for alias, number in aliases.items():
        found.setdefault(int(number), []).append(alias)
    return found
