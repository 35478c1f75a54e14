"""Streams that version 0.1.0 left behind (commit 4084f75, before the folders) go on as they were.

The archive is made by `make_fixture.py`, with the old version. Names, formats and keys that users
have stored are all in it: features, learned tasks, registered versions, history, a retraining log.
"""

import json
import runpy
import sqlite3
import tarfile
from pathlib import Path

import pytest

from pipelines.cli.main import run
from pipelines.platform import cluster
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect

HERE = Path(__file__).parent
MAKER = runpy.run_path(str(HERE / "make_fixture.py"))


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder in which the old streams lie, as if it had been moved here; the working folder.

    Everything runs in this process, also where another test has started Ray.
    """
    folder = tmp_path_factory.mktemp("compatibility")
    with tarfile.open(HERE / "stream-0.1.0.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for database in folder.glob("old/*/mlflow.db"):
        with sqlite3.connect(database) as connection:
            MAKER["replace_in"](connection, MAKER["ROOT"], str(folder / "old"))
        connection.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "_is_started", lambda: False)
        patch.chdir(folder / "old")
        yield folder / "old"


def versions(name):
    return connect(open_storage(name), create=False).versions(name)


def learned(name):
    return {path.name for path in Path(name, "runs", name, "learned").iterdir()}


@pytest.mark.parametrize(("name", "version"), [("trained", "2"), ("retrained", "1")])
def test_a_registered_version_loads_in_a_clean_process_and_answers_as_it_did(old, name, version,
                                                                            capsys):
    assert run(["models", "verify", "--name", name, "--version", version,
                "--storage", name]) == 0, capsys.readouterr()


def test_stored_features_are_sound(old):
    assert run(["features", "verify", "--storage", "trained"]) == 0


def test_the_same_training_finds_everything(old, capsys):
    before, kept = json.loads((old / "result.json").read_text()), learned("trained")
    assert run(["train", "--config", "trained.yaml", "--name", "trained", "--storage", "trained",
                "--result", "again.json"]) == 0, capsys.readouterr()
    again = json.loads((old / "again.json").read_text())
    assert again["weights_hash"] == before["weights_hash"]
    assert again["work"] == before["work"]
    assert again["images_decoded"] == 0
    assert learned("trained") == kept
    assert len(versions("trained")) == 2


def test_a_new_task_goes_on_from_the_learned_ones(old, capsys):
    before = learned("trained")
    MAKER["put_task"](old / "tasks" / "c", (4, 5))
    assert run(["train", "--config", "trained.yaml", "--name", "trained", "--storage", "trained",
                "--result", "grown.json"]) == 0, capsys.readouterr()
    grown = json.loads((old / "grown.json").read_text())
    assert grown["images_decoded"] == 2 * MAKER["IMAGES"]
    assert before < learned("trained")
    newest = max(versions("trained"), key=lambda version: version.version)
    assert (newest.version, newest.task) == (3, "c")
    assert newest.tags["parent"] in before


def test_a_pass_of_retraining_goes_on_from_the_log(old, capsys):
    before = learned("retrained")
    MAKER["put_task"](old / "retrained" / "inbox" / "c", (4, 5))
    (old / "retrained" / "inbox" / "c" / "_READY").write_text("")
    (old / "open.yaml").write_text(json.dumps(json.loads((old / "policy.yaml").read_text()) | {
        "min_above_chance": None}))  # what three epochs on 32 images reach is not the point here
    words = ["retrain", "--name", "retrained", "--storage", "retrained", "--policy", "open.yaml"]
    assert run(words) == 0, capsys.readouterr()
    newest = max(versions("retrained"), key=lambda version: version.version)
    assert (newest.version, newest.task) == (3, "c")
    assert newest.tags["parent"] in before
    assert run(words) == 0
    assert len(versions("retrained")) == 3


def test_rolling_back_leads_to_a_version_of_before(old, capsys):
    words = ["--name", "retrained", "--storage", "retrained"]
    assert run(["models", "rollback", *words, "--why", "test"]) == 0, capsys.readouterr()
    champion = connect(open_storage("retrained"), create=False).resolve(
        "models:/retrained@champion")
    assert champion.version == 2
    assert run(["predict", "--model", "models:/retrained@champion", "--task", "b", "--input",
                "tasks/b/test", "--storage", "retrained"]) == 0, capsys.readouterr()
