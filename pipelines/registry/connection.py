"""Reaching MLflow: which server or database, and a client that answers."""

import contextlib
import fcntl
import logging
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partialhn.errors import InputError
from pipelines.platform.storage import Storage
from pipelines.settings import mask_password

if TYPE_CHECKING:
    from mlflow import MlflowClient


def default_tracking_uri(storage: Storage) -> str:
    """SQLite in the storage folder, or in the working folder when the storage is remote."""
    folder = Path(storage.root) if storage.is_local else Path.cwd()
    return f"sqlite:///{folder / 'mlflow.db'}"


def chosen_uri(storage: Storage, tracking_uri: str | None) -> str:
    """`tracking_uri`, else MLFLOW_TRACKING_URI, else SQLite at the storage."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or default_tracking_uri(storage)


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite registry; None for any other."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def open_client(storage: Storage, tracking_uri: str | None,
                create: bool) -> tuple["MlflowClient", str]:
    """A client that was answered, and the URI, as `chosen_uri` gives it.

    A new SQLite database is set up here, once, under a lock. With `create=False` a database that
    does not exist is an InputError: nothing is registered there.
    """
    uri = chosen_uri(storage, tracking_uri)
    database = sqlite_file(uri)
    if database and not create and not database.exists():
        raise InputError(f"no registry at {uri}; give the --storage or --tracking-uri that "
                         "`partialhn train` was given")
    if storage.s3 and storage.s3.endpoint:  # MLflow's own uploads know the endpoint by these only
        os.environ.setdefault("MLFLOW_S3_ENDPOINT_URL", storage.s3.endpoint)
        if storage.s3.path_style:
            os.environ.setdefault("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE", "path")
    try:
        _check_server(uri)  # before seconds are spent on imports
    except OSError as error:
        raise _no_answer(uri, error) from None
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    _quiet()
    try:
        with _exclusive(database) if database else contextlib.nullcontext():
            if database and not database.exists():
                _create(database)
            client = MlflowClient(tracking_uri=uri)
            client.search_registered_models(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:
        raise _no_answer(uri, error) from None
    return client, uri


def _no_answer(uri: str, error: Exception) -> InputError:
    """Without its cause, which may hold the password."""
    shown = mask_password(f"{uri!r} does not answer: {error}")
    return InputError(f"MLflow at {shown}; allowed: an http(s):// server, sqlite:///file or "
                      "another database")


def _quiet() -> None:
    """MLflow's and its migrations' progress lines are no news to our users; warnings are."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # it warns where pip is not installed, as in an environment made by uv
        logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)


def _check_server(uri: str) -> None:
    """Fails within seconds where no server is; MLflow alone would try again for minutes."""
    if uri.startswith(("http://", "https://")):
        # an HTTPError is an answer too, if only a request for credentials
        with contextlib.suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=15).close()


def _create(database: Path) -> None:
    """A new SQLite database, made beside its place and moved there when it is whole.

    MLflow brings one up to date in some seventy steps and waits for the disk after each; killed
    between them, it leaves one that cannot be used. A draft need not wait.
    """
    from mlflow import MlflowClient
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    draft = database.with_name(f".{database.name}.draft")
    for left in (draft, draft.with_name(f"{draft.name}-journal")):
        left.unlink(missing_ok=True)

    def hurry(connection: Any, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            name = connection.execute("PRAGMA database_list").fetchone()[2]
            if Path(name).name == draft.name:
                connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", hurry)
    try:
        MlflowClient(tracking_uri=f"sqlite:///{draft}").search_registered_models(max_results=1)
    finally:
        event.remove(Engine, "connect", hurry)
    with draft.open("rb+") as file:
        os.fsync(file.fileno())
    draft.replace(database)


@contextlib.contextmanager
def _exclusive(database: Path) -> Iterator[None]:
    """One process at a time sets up a database: MLflow's migrations race."""
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
