"""A new registry in a SQLite file: whole or not there."""

import gc
import os
import sqlite3
from pathlib import Path

import pytest

from partialhn.errors import InputError
from pipelines.platform.importing import SELDOM, importing, seldom_collected
from pipelines.platform.s3 import s3_client
from pipelines.platform.storage import open_storage
from pipelines.registry.client import _listed
from pipelines.registry.connection import _send_artifacts_to, open_client, sqlite_file


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


@pytest.mark.parametrize(("uri", "file"), [
    ("sqlite:///mlflow.db", Path("mlflow.db")),
    ("sqlite:////data/mlflow.db?timeout=60", Path("/data/mlflow.db")),
    ("sqlite+pysqlite:////data/a b.db", Path("/data/a b.db")),
    ("postgresql://user@host/mlflow", None), ("https://host", None),
])
def test_the_file_of_a_registry(uri, file):
    assert sqlite_file(uri) == file


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite:mlflow.db"])
def test_a_database_that_keeps_nothing_is_refused(uri):
    with pytest.raises(InputError, match=r"allowed: sqlite:///file"):
        sqlite_file(uri)


@pytest.mark.parametrize("option", ["", "?timeout=60"])
def test_versions_go_to_the_registry_that_is_named(tmp_path, monkeypatch, option):
    """A library's environment does not overrule an explicit option."""
    other = f"sqlite:///{tmp_path / 'other.db'}"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", other)
    named = tmp_path / "named.db"
    storage = open_storage(str(tmp_path))
    for _ in range(2):  # a new database, and one that exists
        client, _ = open_client(storage, f"sqlite:///{named}{option}", create=True)
    client.create_registered_model("s")
    with sqlite3.connect(named) as database:
        assert database.execute("SELECT name FROM registered_models").fetchall() == [("s",)]
    assert not (tmp_path / "other.db").exists()


# A library's environment does not overrule an explicit option -----------------------------------

VARIABLES = ("MLFLOW_S3_ENDPOINT_URL", "AWS_DEFAULT_REGION", "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE")


@pytest.fixture
def elsewhere(monkeypatch):
    """An environment that names another service for each of MLflow's variables."""
    for name, value in zip(VARIABLES, ("http://other:1", "other-1", "virtual"), strict=True):
        monkeypatch.setenv(name, value)


def test_models_go_to_the_service_of_the_storage(elsewhere):
    storage = open_storage("s3://bucket/prefix?endpoint=http://ours:9000&region=ours-1")
    _send_artifacts_to(storage, is_server=False)
    assert [os.environ[name] for name in VARIABLES] == ["http://ours:9000", "ours-1", "path"]


def test_a_server_may_have_a_bucket_of_its_own(elsewhere):
    storage = open_storage("s3://bucket/prefix?endpoint=http://ours:9000&region=ours-1")
    _send_artifacts_to(storage, is_server=True)
    assert [os.environ[name] for name in VARIABLES] == ["http://other:1", "other-1", "virtual"]


def test_two_services_by_mistake_are_refused(elsewhere):
    with pytest.raises(InputError, match="models would go to another service than features"):
        _send_artifacts_to(open_storage("s3://bucket/prefix?region=ours-1"), is_server=False)


def test_the_endpoint_of_an_aws_profile_does_not_split_a_storage(tmp_path, monkeypatch):
    """Arrow does not read it, so boto3 must not."""
    config = tmp_path / "config"
    config.write_text("[default]\nendpoint_url = http://profile:1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    options = open_storage("s3://bucket/prefix?region=eu-west-1").s3
    assert "amazonaws.com" in s3_client(options).meta.endpoint_url


def test_garbage_is_not_looked_for_while_a_module_is_imported_first():
    before = gc.get_freeze_count()
    with importing("a module of this test"):
        assert not gc.isenabled()
    assert gc.isenabled()
    after = gc.get_freeze_count()
    assert after > before
    for known in ("a module of this test", "json"):
        with importing(known):
            assert gc.isenabled()
    assert gc.get_freeze_count() <= after
    with pytest.raises(ImportError), importing("a module that fails"):
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


@pytest.mark.parametrize(("usual", "meanwhile"), [
    ((700, 10, 10), (SELDOM, 10, 10)), ((10 * SELDOM, 5, 5), (10 * SELDOM, 5, 5)),
    ((0, 10, 10), (0, 10, 10))])
def test_a_pass_looks_for_garbage_less_often(usual, meanwhile):
    before = gc.get_threshold()
    gc.set_threshold(*usual)
    try:
        with seldom_collected():
            assert gc.get_threshold() == meanwhile
        assert gc.get_threshold() == usual
    finally:
        gc.set_threshold(*before)


def test_versions_are_listed_by_number():
    assert _listed([1, 10, 2]) == "1, 2, 10"
