"""Connecting to MLflow: chooses the server or database, and checks that it answers."""

import contextlib
import fcntl
import logging
import os
import re
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partialhn.errors import InputError
from pipelines.platform.importing import importing
from pipelines.platform.storage import Storage
from pipelines.registry.reading import ClientReader, Reader, sqlite_reader
from pipelines.settings import mask_password

if TYPE_CHECKING:
    from mlflow import MlflowClient


_PLAIN = re.compile(r"sqlite:///([^:?%#][^?%#]*)")


def default_tracking_uri(storage: Storage) -> str:
    """A SQLite file in the storage folder, or in the working folder if the storage is remote."""
    folder = Path(storage.root) if storage.is_local else Path.cwd()
    return f"sqlite:///{folder / 'mlflow.db'}"


def chosen_uri(storage: Storage, tracking_uri: str | None) -> str:
    """`tracking_uri`, else MLFLOW_TRACKING_URI, else SQLite at the storage."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(storage)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite registry, whatever driver and options its URI names; None for others.

    Raises: InputError for a SQLite URI that names no file.
    """
    if not uri.startswith(("sqlite:", "sqlite+")):
        return None
    if plain := _PLAIN.fullmatch(uri):  # without the import of a second
        return Path(plain[1])
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(uri).database
    except ArgumentError as error:
        raise InputError(f"tracking_uri {uri!r} is no database URI ({error}); allowed: "
                         "sqlite:///file") from None
    if not name or name == ":memory:":
        raise InputError(f"tracking_uri {uri!r} names no file, so nothing would be kept; allowed: "
                         "sqlite:///file")
    return Path(name)


def exists(storage: Storage, tracking_uri: str | None) -> bool:
    """Whether there may be a registry already: a server, or a database that is not a new file."""
    database = sqlite_file(chosen_uri(storage, tracking_uri))
    return database is None or database.exists()


class Connection:
    """A registry that is there: read at once, and written through MLflow's client.

    The client of a SQLite registry is made when it is first used, since MLflow's import takes
    seconds.
    """

    def __init__(self, storage: Storage, tracking_uri: str | None, create: bool) -> None:
        """Raises: InputError, as `open_client`."""
        self.uri = chosen_uri(storage, tracking_uri)
        self._arguments = storage, tracking_uri, create
        self._client: MlflowClient | None = None
        self._opening = threading.Lock()
        database = sqlite_file(self.uri)
        reader = sqlite_reader(database) if database and database.exists() else None
        if reader is not None:
            _send_artifacts_to(storage, is_server=False)
        self.reader: Reader = reader or ClientReader(self.client)

    @property
    def client(self) -> "MlflowClient":
        """MLflow's client. Raises: InputError, as `open_client`."""
        with self._opening:
            if self._client is None:
                self._client, _ = open_client(*self._arguments)
            return self._client


def open_client(storage: Storage, tracking_uri: str | None,
                create: bool) -> tuple["MlflowClient", str]:
    """A client whose server or database answers, and its URI (`chosen_uri`).

    A new SQLite database is created here, once, under a lock. Raises: InputError if MLflow does not
    answer; with `create=False` also if the database does not exist.
    """
    uri = chosen_uri(storage, tracking_uri)
    database = sqlite_file(uri)
    if database and not create and not database.exists():
        raise InputError(f"there is no registry at {uri}; give the --storage or --tracking-uri of "
                         "the `partialhn train` that registered the stream")
    is_server = uri.startswith(("http://", "https://"))
    if not is_server:
        _refuse_workspaces(uri)
    _send_artifacts_to(storage, is_server=is_server)
    try:
        _check_server(uri)  # before the imports, which take seconds
    except OSError as error:
        raise _no_answer(uri, error) from None
    with importing("mlflow"):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

    _quiet()
    try:
        with _exclusive(database) if database else contextlib.nullcontext():
            if database and not database.exists():
                _create(database)
            _check_database(uri)
            # named for both: MLFLOW_REGISTRY_URI would send the versions elsewhere
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            client.search_registered_models(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise _no_answer(uri, error) from None
    return client, uri


def _refuse_workspaces(uri: str) -> None:
    """Raises InputError where MLflow would write a database that others cannot open any more."""
    if os.environ.get("MLFLOW_ENABLE_WORKSPACES", "").lower() in ("1", "true"):
        raise InputError(f"MLFLOW_ENABLE_WORKSPACES is set, so the database {mask_password(uri)} "
                         "would get workspaces, and processes without the variable could not open "
                         "it; allowed: unset it, or an MLflow server as tracking_uri")


def _send_artifacts_to(storage: Storage, *, is_server: bool) -> None:
    """Sets the environment from which MLflow takes the S3 service of its uploads.

    Without a server, models are uploaded to the storage, so its endpoint, region and addressing
    overrule what the environment says for other programs. A server may have a bucket of its own.

    Raises: InputError if the environment names a service for MLflow, and the storage none.
    """
    if storage.s3 is None:
        return
    variables = {"MLFLOW_S3_ENDPOINT_URL": storage.s3.endpoint,
                 "AWS_DEFAULT_REGION": storage.s3.region,
                 "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE": "path" if storage.s3.path_style else None}
    elsewhere = os.environ.get("MLFLOW_S3_ENDPOINT_URL")
    if elsewhere and not storage.s3.endpoint and not is_server:
        raise InputError(f"MLFLOW_S3_ENDPOINT_URL is {elsewhere!r}, and the storage {storage.uri} "
                         "names no endpoint, so models would go to another service than features; "
                         f"allowed: {storage.uri}?endpoint={elsewhere}, or unset the variable")
    for name, value in variables.items():
        if value and is_server:
            os.environ.setdefault(name, value)
        elif value:
            os.environ[name] = value


def _no_answer(uri: str, error: Exception) -> InputError:
    """The error for a user; its cause is left out because it may contain the password."""
    shown = mask_password(f"{uri!r} does not answer: {error}")
    return InputError(f"MLflow at {shown}; allowed: an http(s):// server, sqlite:///file or "
                      "another database")


def _quiet() -> None:
    """Hides the progress lines of MLflow and its migrations; warnings are still shown."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # it warns if pip is not installed, as in an environment that uv created
        logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)


def _check_server(uri: str) -> None:
    """Raises OSError within seconds if no server answers; MLflow itself would try for minutes."""
    if uri.startswith(("http://", "https://")):
        # an HTTPError is also an answer, for example a request for credentials
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=15).close()


def _check_database(uri: str) -> None:
    """Fails at once where a database refuses; MLflow alone would try again for 100 seconds."""
    if uri.partition("://")[0].partition("+")[0] in ("postgresql", "mysql", "mssql"):
        from sqlalchemy import create_engine

        engine = create_engine(uri)
        try:
            engine.connect().close()
        finally:
            engine.dispose()


def _create(database: Path) -> None:
    """Creates a SQLite database as a draft beside its path, and moves it there when complete.

    MLflow creates a database in about seventy migrations and waits for the disk after each; if it
    is killed between them, the database cannot be used. A draft does not have to wait.
    """
    from mlflow import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    draft = database.with_name(f".{database.name}.draft")
    for leftover in (draft, draft.with_name(f"{draft.name}-journal")):
        leftover.unlink(missing_ok=True)

    def do_not_wait_for_disk(connection: Any, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            name = connection.execute("PRAGMA database_list").fetchone()[2]
            if Path(name).name == draft.name:
                connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", do_not_wait_for_disk)
    try:
        new = f"sqlite:///{draft}"
        MlflowClient(tracking_uri=new, registry_uri=new).search_registered_models(max_results=1)
    finally:
        event.remove(Engine, "connect", do_not_wait_for_disk)
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.replace(database)


@contextlib.contextmanager
def _exclusive(database: Path) -> Iterator[None]:
    """Holds a lock, so that only one process at a time runs MLflow's migrations."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
