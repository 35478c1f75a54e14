"""What an attacker or a careless environment may try: pickles, malformed files, paths, secrets."""

import dataclasses
import hashlib
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch

from partialhn.checkpoints import checkpoint
from partialhn.errors import InputError, IntegrityError
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.store import FeatureStore
from pipelines.platform.storage import open_storage
from pipelines.registry.versions import task_alias
from pipelines.search.state import SearchState
from pipelines.settings import check_name
from tests.processes import script
from tests.support import SECRETS, names_of_files_without_secrets

HERE = Path(__file__).parent
AUDIT = runpy.run_path(str(HERE / "audit.py"))

# Pickles -------------------------------------------------------------------------------------


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def evil(tmp_path):
    mark = tmp_path / "ran"
    content = pickle.dumps(Evil(mark))
    pickle.loads(content).close()
    assert mark.exists(), "the trap works"
    mark.unlink()
    yield content
    assert not mark.exists(), "something was unpickled"


def test_a_pickle_as_a_checkpoint_does_not_run(evil, tmp_path):
    folder = tmp_path / "model"
    checkpoint.save(folder, "model", {"a": torch.zeros(2)}, {})
    fields = json.loads((folder / "model.json").read_text())
    torch_file = tmp_path / "torch.pt"
    torch.save({"a": torch.zeros(2)}, torch_file)
    for content in (evil, torch_file.read_bytes()):
        (folder / "model.safetensors").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        (folder / "model.json").write_text(json.dumps(fields | {"tensors_sha256": digest}))
        with pytest.raises(IntegrityError, match="is no safetensors file"):
            checkpoint.load(folder, "model")
    (folder / "model.json").write_bytes(evil)
    with pytest.raises(IntegrityError, match="cannot be read"):
        checkpoint.load(folder, "model")


@pytest.fixture
def shelf(tmp_path):
    """A feature store with one set of features."""
    store = FeatureStore(pafs.LocalFileSystem(), str(tmp_path))
    recipe = FeatureRecipe("t", "d", "none", 16, 1, "none", 0, "float32", 4)
    shard = store.write_shard(recipe, 0, torch.ones(4, 1, 3, 2, 2), np.zeros(4, np.int64),
                              list("abcd"), seconds=0)
    return store, store.commit(recipe, [shard], (1, 3, 2, 2)), Path(store.folder(recipe.key))


def test_a_pickle_as_a_feature_shard_does_not_run(evil, shelf):
    store, manifest, folder = shelf
    shard = dataclasses.replace(manifest.shards[0], bytes=len(evil),
                                sha256=hashlib.sha256(evil).hexdigest())
    (folder / shard.name).write_bytes(evil)
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        store.open(dataclasses.replace(manifest, shards=(shard,)))
    (folder / "manifest.json").write_bytes(evil)
    with pytest.raises(IntegrityError, match="cannot be read"):
        store.find(manifest.recipe)


@pytest.mark.parametrize("file", ["search.json", "forecast.json", "trials/0001.json",
                                  "started/0001.json"])
def test_a_pickle_as_the_state_of_a_search_does_not_run(evil, tmp_path, file):
    """Nor does one under the names that Ray Tune gives its own state, which nothing reads."""
    state = SearchState(open_storage(str(tmp_path / "store")), "s")
    planted = Path(state.folder) / file
    names = [planted, *(Path(state.folder) / name for name in (
        "tuner.pkl", "trainable.pkl", "searcher-state.pkl", "experiment_state.json"))]
    planted.parent.mkdir(parents=True)
    for path in names:
        path.write_bytes(evil)
    reads = {"search.json": state.settings, "trials/0001.json": state.records,
             "started/0001.json": state.interrupted,
             "forecast.json": lambda: state.keep("forecast", dict)}
    with pytest.raises(IntegrityError, match=f"{file} (is no JSON|cannot be read)"):
        reads[file]()


# Malformed files -----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["images", "parquet", "features", "checkpoints", "texts"])
@pytest.mark.parametrize(("first", "count"), [
    (0, 80), pytest.param(1000, 4000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_mutated_files_are_refused_within_memory(target, first, count, tmp_path):
    done = script(HERE / "fuzz.py", tmp_path / "work", target, first, count,
                  cwd=tmp_path).wait(3500)
    last = tmp_path / "work" / "last"
    at = last.read_text() if last.exists() else "none"
    assert done.returncode == 0, f"last seed {at}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    refused = int(done.stdout.split(" refused")[0].rsplit(" ", 1)[1])
    assert refused >= count // 3, done.stdout


# Paths ---------------------------------------------------------------------------------------

TRICKS = ["../x", "..", ".", "/etc/passwd", "%2e%2e/x", "a\0b", "a/../../b", "a" * 5000, "champion",
          "challenger", "latest", "v1", "", "a\nb", "C:\\x", "~"]


@pytest.mark.parametrize("trick", TRICKS)
def test_aliases_of_tricky_tasks_are_plain_words_of_their_own(trick):
    alias = task_alias(trick)
    assert alias.startswith("task-")
    assert set(alias) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert len(alias) <= 255
    assert len({task_alias(other) for other in TRICKS}) == len(TRICKS)


@pytest.mark.parametrize("trick", ["../x", "..", "/etc/passwd", "%2e%2e", "a\0b", "a/b", "a" * 5000,
                                   "", "a\n", "~", "-x", "a b"])
def test_streams_cannot_have_tricky_names(trick):
    with pytest.raises(InputError, match="name is"):
        check_name(trick)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "part-00000-aaaaaaaaaaaa.arrow/..",
                                  "..%2fx", "part-00000-\0.arrow", "x" * 5000])
def test_a_manifest_cannot_point_outside_its_folder(shelf, name):
    store, manifest, folder = shelf
    fields = json.loads((folder / "manifest.json").read_text())
    fields["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(fields))
    with pytest.raises(IntegrityError, match="cannot be read: ValueError"):
        store.find(manifest.recipe)


# Secrets -------------------------------------------------------------------------------------

def test_no_run_writes_down_a_credential(tmp_path):
    """A whole small run with keys in its environment; every byte it left is searched.

    `tests/faults/test_retrain_chaos.py` searches what passes on Ray leave, Ray's logs among them.
    """
    done = subprocess.run(
        [Path(sys.executable).with_name("partialhn"), "train", "--data", "digits", "--classes", "4",
         "--tasks", "2", "--input-size", "16", "--trunk-epochs", "1", "--epochs", "1",
         "--threads", "1", "--name", "hush", "--storage", tmp_path / "store"],
        cwd=tmp_path, env=os.environ | SECRETS, capture_output=True, text=True, timeout=580,
        check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "printed").write_text(done.stdout + done.stderr)
    assert {"mlflow.db", "result.json", "printed"} <= names_of_files_without_secrets(tmp_path)


# Audit ---------------------------------------------------------------------------------------


def package(name, licence):
    return {"Name": name, "Version": "1", "License": licence}


def test_licences_are_held_against_the_list():
    problems = AUDIT["licence_problems"]
    allowed = ["MIT", "Apache-2.0", "Mozilla Public License 2.0 (MPL 2.0)"]
    for licence in ("MIT", "GPL-3.0 OR MIT", "MIT AND Apache-2.0", "MIT; Apache-2.0",
                    "Mozilla Public License 2.0 (MPL 2.0)"):
        assert problems([package("a", licence)], allowed, {}) == []
    for licence in ("GPL-3.0", "MIT AND GPL-3.0", "UNKNOWN", ""):
        assert len(problems([package("a", licence)], allowed, {})) == 1
        assert problems([package("a", licence)], allowed, {"a": "why"}) == []
    assert "not installed" in problems([], allowed, {"gone": "why"})[0]


def test_what_was_not_looked_up_is_no_all_clear():
    read = AUDIT["read_advisories"]
    hole = {"id": "PYSEC-1", "fix_versions": ["2"]}
    assert read({"dependencies": [{"name": "a", "version": "1", "vulns": [hole]},
                                  {"name": "b", "skip_reason": "not found"}]}) == (
        ["a 1: PYSEC-1, fixed in 2"], ["not found"], 1)


def test_everything_installed_has_an_allowed_licence():
    import tomllib

    rules = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["tool"]
    rules = rules["partialhn-audit"]
    assert AUDIT["licence_problems"](AUDIT["_licences"](), rules["licences"],
                                     rules["exceptions"]) == []
