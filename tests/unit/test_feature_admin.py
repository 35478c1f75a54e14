"""The feature store from the command line: listed, described, and read again byte for byte."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch

from partialhn.errors import InputError
from partialhn.features.codec import NumberType
from partialhn.features.manifest import FeatureRecipe
from partialhn.features.table import NUMBER_TYPES, register_number_type
from pipelines.cli.main import run
from pipelines.features.produce import open_store
from pipelines.platform.storage import open_storage

RECIPE = FeatureRecipe(trunk="t", data="d", transform="none", input_size=16, views=2,
                       augment="flip", seed=0, dtype="float16", shard_rows=4)


@pytest.fixture
def store(tmp_path):
    """A finished set of ten rows in three shards, and one that was not finished."""
    store = open_store(open_storage(str(tmp_path)))
    shards = [store.write_shard(RECIPE, index, torch.zeros(rows, 2, 3, 2, 2), np.zeros(rows),
                                [str(row) for row in range(rows)], seconds=1.5,
                                bad=[("9.png", "is empty")] if not index else [])
              for index, rows in enumerate((4, 4, 2))]
    store.commit(RECIPE, shards, (2, 3, 2, 2))
    other = dataclasses.replace(RECIPE, seed=1)
    store.write_shard(other, 0, torch.zeros(4, 2, 3, 2, 2), np.zeros(4), list("abcd"), seconds=1)
    return store


@pytest.fixture
def command(store, capsys):
    def call(*words):
        code = run(["features", *words, "--storage", store.root])
        return code, *capsys.readouterr()
    return call


def test_list_tells_finished_from_unfinished(command):
    code, out, _ = command("list")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert rows[RECIPE.key][1:5] == ["complete", "10", "2x3x2x2", "float16"]
    assert rows[dataclasses.replace(RECIPE, seed=1).key][1] == "partial"
    assert out.splitlines()[-1].startswith("2 sets of features, ")
    assert "which features registered versions need is unknown" in out
    assert rows[RECIPE.key][-1] == "unknown", "no registry was asked whether a version needs it"


def test_features_of_a_package_that_is_gone_are_not_called_damaged(store, command):
    mine = dataclasses.replace(RECIPE, dtype="mine")
    register_number_type("mine", NumberType(torch.int8, pa.int8(), levels=7))
    try:
        shard = store.write_shard(mine, 0, torch.ones(4, 2, 3, 2, 2), np.zeros(4), list("abcd"),
                                  seconds=1)
        manifest = store.commit(mine, [shard], (2, 3, 2, 2))
    finally:
        NUMBER_TYPES.unregister("mine")
    code, out, _ = command("list")
    rows = {line.split()[0]: line.split() for line in out.splitlines()}
    assert (code, *rows[mine.key][1:5]) == (0, "complete", "4", "2x3x2x2", "mine")
    assert command("verify", "--key", mine.key)[0] == 0
    with pytest.raises(InputError, match="feature_dtype is 'mine'; allowed: float32"):
        store.open(manifest)


def test_an_empty_store_says_so(tmp_path, capsys):
    assert run(["features", "list", "--storage", str(tmp_path / "none")]) == 0
    assert "there are no features in" in capsys.readouterr().out


def test_show_says_how_it_was_made(command):
    code, out, _ = command("show", RECIPE.key[:8])
    assert code == 0
    for part in ("10 of 16 pixels", "2x3x2x2", "in 3 shards", "4.5 s of work", "pyarrow",
                 "left out 9.png: is empty"):
        assert part in out
    assert command("show", "zzz")[0] == 2
    code, _, err = command("show", dataclasses.replace(RECIPE, seed=1).key)
    assert (code, "not finished" in err) == (2, True)


def test_verify_names_the_damaged_shard(command, store):
    code, out, _ = command("verify")
    assert (code, f"{RECIPE.key}  good: 3 shards, 10 rows" in out) == (0, True)
    manifest = store.find(RECIPE)
    store.open(manifest)
    path = f"{store.folder(RECIPE.key)}/{manifest.shards[1].name}"
    content = bytearray(open(path, "rb").read())  # noqa: PTH123, SIM115
    content[200] ^= 1
    open(path, "wb").write(content)  # noqa: PTH123, SIM115
    code, out, _ = command("verify", "--key", RECIPE.key[:6])
    assert code == 1
    assert manifest.shards[1].name in out
    assert manifest.shards[0].name not in out
    assert f"expected {manifest.shards[1].sha256[:12]}" in out
    assert out.splitlines()[-1].startswith("to have damaged features computed again, delete their")


def test_verify_names_a_missing_shard_and_a_damaged_manifest(command, store):
    import pathlib

    folder = pathlib.Path(store.folder(RECIPE.key))
    (folder / store.find(RECIPE).shards[2].name).unlink()
    code, out, _ = command("verify")
    assert (code, "is missing" in out) == (1, True)
    (folder / "manifest.json").write_text("{")
    code, out, _ = command("verify")
    assert (code, f"manifest of features {RECIPE.key} cannot be read" in out) == (1, True)
    assert "damaged" in command("list")[1]


@pytest.mark.parametrize("words", [("features", "list"), ("features", "verify"),
                                   ("features", "show", "a"), ("features", "prune",
                                                               "--unreferenced"),
                                   ("train", "--data", "digits", "--tasks", "5")])
def test_without_keys_of_aws_a_command_says_what_to_set(words, monkeypatch, tmp_path, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    code = run([*words, "--storage", "s3://bucket/a?endpoint=http://127.0.0.1:9&region=nowhere"])
    assert code == 2
    assert "error: no AWS credentials found; give AWS_ACCESS_KEY_ID" in capsys.readouterr().err
