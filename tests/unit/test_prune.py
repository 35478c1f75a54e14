"""Pruning: what nothing needs goes, what anything needs stays, and nobody sees a broken set."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from partialhn.errors import InputError, IntegrityError
from partialhn.features.manifest import FeatureRecipe
from pipelines.cli.main import run
from pipelines.features.in_use import InUse, records
from pipelines.features.produce import open_store
from pipelines.platform.lease import Lease
from pipelines.platform.storage import open_storage
from pipelines.retrain.journal import Decided, Journal
from pipelines.upkeep.prune import age_text, delete, parse_age, prunable, stored
from pipelines.upkeep.references import references

RECIPE = FeatureRecipe(trunk="t", data="d", transform="none", input_size=16, views=1,
                       augment="none", seed=0, dtype="float16", shard_rows=4)
DAY = 86400


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path))


@pytest.fixture
def add(storage):
    """Stores a set of eight rows in two shards; its recipe's number makes its key."""
    store = open_store(storage)

    def make(seed, *, days=0.0, finished=True):
        recipe = dataclasses.replace(RECIPE, seed=seed)
        shards = [store.write_shard(recipe, index, torch.full((4, 1, 3, 2, 2), seed),
                                    np.zeros(4), list("abcd"), seconds=1) for index in (0, 1)]
        if finished:
            store.commit(recipe, shards, (1, 3, 2, 2))
        for path in pathlib.Path(store.folder(recipe.key)).iterdir():
            os.utime(path, (time.time() - days * DAY,) * 2)
        return recipe.key
    return make


@pytest.fixture
def prune(storage, capsys, monkeypatch):
    """`partialhn features prune` where no model was ever registered."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def call(*words, registry=False):
        code = run(["features", "prune", "--storage", storage.root, *words,
                    *([] if registry else ["--no-registry"])])
        return code, *capsys.readouterr()
    return call


def keys(storage):
    return set(storage.folders(storage.path("features")))


@contextlib.contextmanager
def child(work):
    """Runs work(ready) in another process, killed at the end; `ready()` lets this one go on."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work(lambda: os.write(writing, b"."))
        finally:
            os._exit(0)
    try:
        assert os.read(reading, 1)
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def test_nothing_is_deleted_unless_it_is_said(storage, add, prune):
    old, new = add(0, days=40), add(1, days=1)
    code, out, _ = prune("--older-than", "30d")
    assert (code, keys(storage)) == (0, {old, new})
    assert re.search(rf"{old}  [\d.]+ k?B  40d old  would be deleted", out)
    assert new not in out
    assert re.fullmatch(r"1 set of features, [\d.]+ k?B would be deleted; to delete them, "
                        "give --delete",
                        out.splitlines()[-1])
    code, out, _ = prune("--older-than", "30d", "--delete")
    assert (code, keys(storage)) == (0, {new})
    assert "40d old  deleted" in out
    assert prune("--unreferenced", "--delete")[0] == 0
    assert keys(storage) == set()


def test_unfinished_sets_go_when_they_are_a_day_old(storage, add, prune):
    old, new = add(0, days=1.5, finished=False), add(1, days=0.5, finished=False)
    assert prune("--unreferenced", "--delete")[0] == 0
    assert keys(storage) == {new}
    assert old not in keys(storage)
    assert prune("--older-than", "1h", "--delete")[0] == 0
    assert keys(storage) == {new}


@pytest.mark.parametrize("words", [(), ("--older-than", "soon"), ("--older-than", "30"),
                                   ("--older-than", "-3d")])
def test_what_is_no_age_is_refused(prune, add, storage, words):
    add(0, days=99)
    code, _, err = prune(*words, "--delete")
    assert (code, len(keys(storage))) == (2, 1)
    assert "older" in err


def test_ages():
    assert [parse_age(text) for text in ("30d", "12h", "1.5w", "90min")] == [
        30 * DAY, DAY / 2, 10.5 * DAY, 5400]
    assert [age_text(seconds) for seconds in (59, 60, 7200, 3 * DAY + 5)] == [
        "0min", "1min", "2h", "3d"]


# What is needed ----------------------------------------------------------------------------------


def test_features_of_a_streams_log_stay(storage, add, prune):
    kept, other = add(0, days=99), add(1, days=99)
    lease = Lease(storage, "pets")
    assert lease.acquire() is None
    decided = Decided("cats", ("a", "b"), "f", "none",
                      {"test": dataclasses.replace(RECIPE, seed=0).fields()}, "s", "p", "prefix",
                      "", "", {"passed": True}, {}, {}, "")
    Journal(storage, "pets").append(lease, "decided", dataclasses.asdict(decided))
    lease.release()
    code, out, _ = prune("--unreferenced", "--delete")
    assert (code, keys(storage)) == (0, {kept})
    assert other in out
    assert references(storage, None) == {kept: ["stream pets, task cats"]}


def test_features_of_a_registered_version_stay(tmp_path, empty_registry, digit_tasks, capsys,
                                               monkeypatch):
    """And without the registry that knows them nothing is deleted."""
    from pipelines.registry.client import connect

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    empty_registry(tmp_path / "store")
    storage = open_storage(str(tmp_path / "store"))
    digit_tasks.register(connect(storage), "digits", 0)  # tagged with the features "key"
    for key in ("key", "other"):
        storage.write_text(storage.path("features", key, "manifest.json"), "{}")

    def command(word, *words):
        code = run(["features", word, "--storage", storage.root, *words])
        return code, *capsys.readouterr()

    code, out, _ = command("list")
    needed = {line.split()[0]: line.split()[-1] for line in out.splitlines()}
    assert (code, needed["key"], needed["other"]) == (0, "models:/digits/1", "-")
    code, _, err = command("prune", "--unreferenced", "--delete", "--no-registry")
    assert (code, keys(storage)) == (2, {"key", "other"})
    assert "has the history of digits" in err
    empty_registry(tmp_path / "another")
    another = f"sqlite:///{tmp_path / 'another' / 'mlflow.db'}"
    code, _, err = command("prune", "--unreferenced", "--delete", "--tracking-uri", another)
    assert (code, keys(storage)) == (2, {"key", "other"})
    assert "history of digits, which is not in the registry" in err
    code, out, _ = command("prune", "--unreferenced", "--delete")
    assert (code, keys(storage)) == (0, {"key"})


def test_no_registry_is_no_proof_that_nothing_is_registered(storage, add, prune):
    add(0, days=99)
    code, _, err = prune("--unreferenced", "--delete", registry=True)
    assert (code, len(keys(storage))) == (2, 1)
    assert "no registry at" in err


def test_features_of_a_running_job_stay_until_it_ends(storage, add, prune, capsys):
    mine, other = add(0, days=99), add(1, days=99)

    def job(ready):
        InUse(storage, "stream pets").add([mine])
        ready()
        time.sleep(60)

    with child(job) as pid:
        code, out, _ = prune("--unreferenced", "--delete")
        assert (code, keys(storage)) == (0, {mine})
        assert mine not in out
        assert run(["features", "list", "--storage", storage.root]) == 0
        assert f"stream pets on {os.uname().nodename} (process {pid})" in capsys.readouterr().out
    assert prune("--unreferenced", "--delete")[0] == 0
    assert keys(storage) == set()
    assert other not in keys(storage)


def test_a_job_elsewhere_counts_until_its_record_expires(storage, add, prune):
    key = add(0, days=99)
    path = storage.path("in-use", "x.json")
    record = {"what": "stream pets", "keys": [key], "prunes": False, "host": "other", "pid": 1,
              "machine": "of another boot", "started": "5", "expires": time.time() + 60}
    storage.write_text(path, json.dumps(record))
    assert prune("--unreferenced", "--delete")[0] == 0
    assert keys(storage) == {key}
    storage.write_text(path, json.dumps(record | {"expires": time.time() - 1}))
    os.utime(path, (1, 1))
    assert prune("--unreferenced", "--delete")[0] == 0
    assert keys(storage) == set()
    assert not storage.exists(path), "what nobody holds is cleared away"
    storage.write_text(path, "{")
    with pytest.raises(IntegrityError, match=r"x\.json cannot be read as a record"):
        list(records(storage))


def test_a_record_lives_as_long_as_its_job(storage):
    with InUse(storage, "a", seconds=4) as mine:
        mine.add(["k"])
        for _ in range(3):
            time.sleep(1.5)
            assert [use.keys for _, use in records(storage)] == [("k",)]
        mine.add(["l"])
        assert [use.keys for _, use in records(storage)] == [("k", "l")]
    assert list(records(storage)) == []


def test_a_job_that_begins_during_a_prune_waits_for_its_end(storage):
    def other(ready):
        with InUse(storage, "features prune", prunes=True) as pruning:
            pruning.add([])
            ready()
            time.sleep(1)

    with child(other), InUse(storage, "a") as job:
        start = time.monotonic()
        with InUse(storage, "b", prunes=True) as second, pytest.raises(InputError, match="is bein"):
            second.add(["k"])
        job.add(["k"])
        assert time.monotonic() - start > 0.5
        assert [use.what for _, use in records(storage)] == ["a"]


def test_a_job_that_began_after_the_look_at_what_is_needed_keeps_its_features(storage, add):
    key, other = add(0, days=99), add(1, days=99)
    found = prunable(stored(storage), references(storage, None), 0)
    with InUse(storage, "a") as job:
        job.add([key])
        done = {each.key: users for each, users in delete(storage, found)}
    assert (keys(storage), done[other]) == ({key}, [])
    assert done[key][0].startswith("a on ")


# Readers and crashes -----------------------------------------------------------------------------


def test_a_reader_during_a_prune_finishes_or_is_told(storage, add, prune, tmp_path):
    key = add(7, days=99)
    store = open_store(storage)
    manifest = store.manifest(key)

    def reader(ready):
        features = store.open(manifest)
        rows_B = torch.arange(8)
        ready()
        while keys(storage):
            assert (features.gather(rows_B, torch.zeros_like(rows_B)) == 7).all()
        found = features.gather(rows_B, torch.zeros_like(rows_B))
        (tmp_path / "seen").write_text(str((found == 7).all().item()))

    with child(reader) as pid:
        assert prune("--unreferenced", "--delete")[0] == 0
        os.waitpid(pid, 0)
    assert (tmp_path / "seen").read_text() == "True"
    assert store.manifest(key) is None
    with pytest.raises(IntegrityError, match=rf"{manifest.shards[0].name} is missing; .*pruned"):
        store.open(manifest)


@pytest.mark.parametrize("deletions", range(1, 6))
def test_a_prune_killed_anywhere_leaves_no_broken_set(storage, add, prune, deletions, monkeypatch):
    key = add(0, days=99)
    store = open_store(storage)
    done = []
    whole = type(storage).delete

    def dying(self, path):
        if len(done) == deletions:
            raise KeyboardInterrupt
        done.append(path)
        whole(self, path)

    monkeypatch.setattr(type(storage), "delete", dying)
    assert prune("--unreferenced", "--delete")[0] == 1
    monkeypatch.setattr(type(storage), "delete", whole)
    assert done[0].endswith("manifest.json")
    assert store.manifest(key) is None
    for index in (0, 1):
        shard = store.find_shard(key, index)
        assert shard is None or storage.exists(f"{store.folder(key)}/{shard.name}")
    shutil.rmtree(storage.path("in-use"), ignore_errors=True)
    assert prune("--unreferenced", "--delete")[0] == 0
    assert keys(storage) == set()
