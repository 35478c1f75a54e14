"""Checkpoints: what is saved comes back, and anything else is refused without running code."""

import concurrent.futures
import dataclasses
import hashlib
import json
import pickle

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import load_file, save_file

from partialhn.checkpoints import checkpoint
from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.errors import IntegrityError
from partialhn.strategies import STRATEGIES
from partialhn.training.learner import Learner

INFOS = (TaskInfo("even", ("0", "1")), TaskInfo("odd", ("2", "3")), TaskInfo("2", ("4", "5")))


@pytest.fixture(scope="module")
def models(cut, tasks, with_options):
    """A trained model of each strategy, and of the additive generator."""
    made = {}
    for name, options in {"partial_hn": {}, "additive": {"hypernet": {"generator": "additive"}},
                          "separate_heads": {"train": {"strategy": "separate_heads"}},
                          "naive": {"train": {"strategy": "naive"}},
                          "ridge": {"train": {"strategy": "ridge"}}}.items():
        config = with_options(**options)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1))
        strategy = STRATEGIES[config.train.strategy](cut.head, cut.start, config)
        list(Learner(strategy, config.train).learn(tasks[:3]))
        made[name] = Model(config, cut.trunk, strategy, INFOS, {"stream": "digits"})
    return made


@pytest.fixture
def saved(models, tmp_path):
    models["partial_hn"].save(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def answers(model, images):
    model.strategy.eval()
    return [model.strategy(model.trunk(images), task) for task in range(len(model.tasks))]


def test_a_loaded_model_makes_the_tasks_that_are_used_and_keeps_all_tensors(saved):
    strategy = Model.load(saved).strategy
    whole = {name: value.clone() for name, value in strategy.state_dict().items()}
    size = [strategy.task_bytes(task) for task in range(3)]
    grounds = [strategy.answers_by(task) for task in range(3)]
    assert [place for place, _ in strategy.tasks.made()] == []
    strategy.weights(2)
    assert sorted(place for place, _ in strategy.tasks.made()) == [0, 2], "it starts from task 0"
    assert [strategy.tasks[place] for place in range(3)] == list(strategy.tasks)
    assert [place for place, _ in strategy.hypernet.columns.made()] == [1]
    assert list(map(len, (strategy.tasks, strategy.hypernet.columns))) == [3, 2]
    assert len(list(strategy.hypernet.columns)) == 2
    again = strategy.state_dict()
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert [strategy.task_bytes(task) for task in range(3)] == size
    assert [strategy.answers_by(task) for task in range(3)] == grounds


def test_waiting_tasks_move_with_their_strategy(saved):
    strategy = Model.load(saved).strategy.to("meta")
    assert {value.device.type for value in strategy.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("name", ["partial_hn", "additive", "separate_heads", "naive", "ridge"])
def test_a_model_comes_back_and_answers_alike(models, tmp_path, images, name):
    model = models[name]
    model.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    assert loaded.weights_hash() == model.weights_hash()
    assert (loaded.config, loaded.tasks, loaded.facts) == (model.config, model.tasks, model.facts)
    for mine, theirs in zip(answers(loaded, images[:16]), answers(model, images[:16]), strict=True):
        assert torch.equal(mine, theirs)
    assert loaded.trunk.fingerprint() == model.trunk.fingerprint()
    assert not any(p.requires_grad for p in loaded.strategy.parameters())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "model.json", "model.safetensors"]


def test_saving_replaces_what_was_there_and_leaves_no_draft(models, saved):
    models["naive"].save(saved)
    assert Model.load(saved).config.train.strategy == "naive"
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(IntegrityError, match=f"cannot be read: .*{name}"):
        Model.load(saved)


def test_a_flipped_byte_anywhere(saved):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    for place in (9, len(content) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match=r"damaged: model\.safetensors has sha256"):
            Model.load(saved)


def rewrite(folder, change_tensors=None, change_fields=None):
    """Changes a checkpoint and makes its checksum fit."""
    tensors = load_file(folder / "model.safetensors")
    fields = json.loads((folder / "model.json").read_text())
    if change_tensors:
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors")
    content = (folder / "model.safetensors").read_bytes()
    fields["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    if change_fields:
        change_fields(fields)
    (folder / "model.json").write_text(json.dumps(fields))


@pytest.mark.parametrize(("change", "message"), [
    (lambda f: f.update(format=2), "in format 2; expected 'model' in 1"),
    (lambda f: f.update(kind="network"), "of kind 'network'"),
    (lambda f: f.pop("format"), "in format None"),
    (lambda f: f.pop("tensors_sha256"), "tensors_sha256"),
    (lambda f: f.pop("weights_hash"), "hash of its weights differs"),
    (lambda f: f.pop("config"), "does not fit"),
    (lambda f: f["config"]["train"].update(epoch=3), r"unknown configuration key train\.epoch"),
    (lambda f: f["config"]["hypernet"].update(fresh_columns=9), "size mismatch"),
    (lambda f: f["tasks"].pop(), "does not fit"),
    (lambda f: f["tasks"][0]["classes"].append("x"), "size mismatch"),
    (lambda f: f.update(weights_hash="0"), "hash of its weights differs"),
])
def test_fields_that_do_not_fit(saved, change, message):
    rewrite(saved, change_fields=change)
    with pytest.raises(IntegrityError, match=message):
        Model.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null"])
def test_fields_that_are_no_fields(saved, text):
    (saved / "model.json").write_text(text)
    with pytest.raises(IntegrityError, match="model"):
        Model.load(saved)


def swap(tensors):
    one = tensors["strategy.tasks.0.bias_K"]
    tensors["strategy.tasks.0.bias_K"] = one + 1


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("strategy.tasks.1.code"), r"Missing .*tasks\.1\.code"),
    (lambda t: t.pop("trunk.mean_C"), "Missing .*mean_C"),
    (lambda t: t.update({"strategy.surplus": torch.zeros(1)}), "Unexpected .*surplus"),
    (lambda t: t.update({"strategy.tasks.1.code": torch.zeros(3)}), "size mismatch"),
    (swap, "hash of its weights differs"),
])
def test_tensors_that_do_not_fit(saved, change, message):
    rewrite(saved, change_tensors=change)
    with pytest.raises(IntegrityError, match=f"(?s){message}"):
        Model.load(saved)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", [
    lambda trap, path: path.write_bytes(pickle.dumps(trap)),
    lambda trap, path: torch.save({"strategy": trap}, path)])
@pytest.mark.parametrize("checksum_fits", [False, True])
def test_a_planted_pickle_does_not_run(saved, tmp_path, write, checksum_fits):
    sprung = tmp_path / "sprung"
    write(Trap(sprung), saved / "model.safetensors")
    if checksum_fits:
        digest = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
        fields = json.loads((saved / "model.json").read_text()) | {"tensors_sha256": digest}
        (saved / "model.json").write_text(json.dumps(fields))
    with pytest.raises(IntegrityError, match="model"):
        Model.load(saved)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung))).close()
    assert sprung.exists()


def test_copies_over_a_filesystem(saved, tmp_path):
    local = LocalFileSystem()
    checkpoint.upload(saved, local, str(tmp_path / "far" / "model"))
    assert checkpoint.fetch(local, str(tmp_path / "far" / "model"), tmp_path / "near")
    assert Model.load(tmp_path / "near").weights_hash() == Model.load(saved).weights_hash()
    assert not checkpoint.fetch(local, str(tmp_path / "none"), tmp_path / "other")


def test_a_copy_cut_short_is_no_copy(saved, tmp_path):
    """Fields are copied last: an upload that was killed leaves nothing to fetch."""
    target = tmp_path / "far"
    checkpoint.upload(saved, LocalFileSystem(), str(target))
    (target / "model.json").unlink()
    assert not checkpoint.fetch(LocalFileSystem(), str(target), tmp_path / "near")


def test_an_upload_over_an_older_one_never_mixes_the_two(models, saved, tmp_path):
    """A target that cannot be written stands for a process that is killed half way."""
    target, local = tmp_path / "far", LocalFileSystem()
    checkpoint.upload(saved, local, str(target))
    (target / "model.safetensors").unlink()
    (target / "model.safetensors").mkdir()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        checkpoint.upload(saved, local, str(target))
    assert not checkpoint.fetch(local, str(target), tmp_path / "near")


def test_an_upload_of_the_same_is_never_without_fields(saved, tmp_path):
    """Two processes that trained one trunk store it; the first one reads what the second writes."""
    class NoDeletes(LocalFileSystem):
        def delete_file(self, path):
            raise AssertionError(f"{path} is gone for a moment")
    target = tmp_path / "far" / "model"
    checkpoint.upload(saved, LocalFileSystem(), str(target))
    checkpoint.upload(saved, NoDeletes(), str(target))
    tensors = target / "model.safetensors"
    whole = tensors.read_bytes()
    for damage in (tensors.unlink, lambda: tensors.write_bytes(whole[:-1] + b"\xff")):
        damage()
        checkpoint.upload(saved, LocalFileSystem(), str(target))
        assert tensors.read_bytes() == whole


def test_processes_that_write_one_file_at_once_each_write_all_of_it(tmp_path):
    path, contents = tmp_path / "cells" / "one.json", [bytes([65 + i]) * 300_000 for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda content: checkpoint.write_whole(
                LocalFileSystem(), str(path), content), contents))
            assert path.read_bytes() in contents
    assert [each.name for each in path.parent.iterdir()] == ["one.json"]


def test_any_kind_of_state_round_trips(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor(3), "empty": torch.empty(0)}
    checkpoint.save(tmp_path / "x", "state", tensors, {"n": 3})
    found, fields = checkpoint.load(tmp_path / "x", "state")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert fields["n"] == 3
    with pytest.raises(IntegrityError, match="of kind 'state'"):
        checkpoint.load(tmp_path / "x", "model")
