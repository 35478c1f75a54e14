"""A new registry in a SQLite file: whole or not there."""

import sqlite3

from pipelines.platform.storage import open_storage
from pipelines.registry.connection import open_client


def test_a_killed_beginning_is_begun_anew(tmp_path):
    """What a process that was killed while it made the database left is no database."""
    (tmp_path / ".mlflow.db.draft").write_bytes(b"half a database")
    (tmp_path / ".mlflow.db.draft-journal").write_bytes(b"and its journal")
    client, uri = open_client(open_storage(str(tmp_path)), None, create=True)
    assert uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
    client.create_registered_model("s")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("SELECT name FROM registered_models").fetchall() == [("s",)]


def test_only_the_draft_does_not_wait_for_the_disk(tmp_path):
    from sqlalchemy import create_engine, text

    open_client(open_storage(str(tmp_path)), None, create=True)
    with create_engine(f"sqlite:///{tmp_path / 'mlflow.db'}").connect() as connection:
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2  # FULL
