"""Models that share tensors: each stores what is new, and a copy is complete again."""

import json
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch

from partialhn.checkpoints import checkpoint, shared
from partialhn.errors import IntegrityError
from partialhn.training import lineage

LOCAL = pafs.LocalFileSystem()
KEPT = torch.arange(4096.0)


def tensors_of(count):
    """What a model of so many tasks holds: some that stay, one a task, one that always changes."""
    return {"trunk": KEPT, "sum": torch.full((8,), float(count)),
            **{f"task.{index}": torch.full((4,), float(index)) for index in range(count)}}


@pytest.fixture
def store(tmp_path):
    """Stores models 0, 1, ... of 1, 2, ... tasks; returns the folder and the names."""
    def put(count):
        names = []
        for index in range(count):
            folder = tmp_path / "local" / f"m{index}"
            checkpoint.save(folder, "model", tensors_of(index + 1), {"tasks": index + 1})
            shared.upload(*checkpoint.load(folder, "model"), LOCAL, str(tmp_path / "models"),
                          f"m{index}", names[-1] if names else "")
            names.append(f"m{index}")
        return tmp_path / "models", names
    return put


def fields(models, name):
    return json.loads((models / name / "model.json").read_text())


def test_a_copy_is_what_was_stored_byte_for_byte(store, tmp_path):
    models, names = store(5)
    for index, name in enumerate(names):
        copy = lineage.fetch_model(LOCAL, str(models), name, tmp_path / "copy" / name)
        assert ((copy / "model.safetensors").read_bytes()
                == (tmp_path / "local" / name / "model.safetensors").read_bytes())
        found, values = checkpoint.load(copy, "model")
        assert values["tasks"] == index + 1
        assert found.keys() == tensors_of(index + 1).keys()
        assert all(torch.equal(found[key], value) for key, value in tensors_of(index + 1).items())
    sizes = [shared.added_bytes(LOCAL, str(models), name, before)
             for name, before in zip(names, ["", *names], strict=False)]
    assert sizes[0] > KEPT.nbytes
    assert max(sizes[1:]) < KEPT.nbytes / 4


def test_many_small_parts_become_few(store, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "MOST_PARTS", 4)
    models, names = store(14)
    assert max(len(shared.parts_of(fields(models, name))) for name in names) <= 8
    for index in (3, 9, 13):
        copy = lineage.fetch_model(LOCAL, str(models), names[index], tmp_path / "c" / names[index])
        found, _ = checkpoint.load(copy, "model")
        assert all(torch.equal(found[key], value) for key, value in tensors_of(index + 1).items())


@pytest.mark.parametrize("change", ["in place", "another", "none"])
def test_a_loaded_tensor_counts_as_stored_only_while_nothing_wrote_to_it(store, tmp_path, change):
    models, names = store(2)
    read = shared.reader(LOCAL, str(models))
    tensors = shared.tensors_of(fields(models, names[-1]), read)
    if change == "in place":
        tensors["task.0"][0] = 7
    elif change == "another":
        tensors["task.0"] = torch.full((4,), 7.0)
    shared.upload(tensors, {"tasks": 2}, LOCAL, str(models), "next", names[-1])
    again = shared.tensors_of(fields(models, "next"), read)
    assert all(torch.equal(value, tensors[name]) for name, value in again.items())
    assert again["task.0"][0] == (0 if change == "none" else 7)


@pytest.mark.parametrize("damage", ["gone", "changed", "short"])
def test_damaged_parts_are_named_and_not_loaded(store, tmp_path, damage):
    models, names = store(2)
    sha256 = shared.parts_of(fields(models, names[1]))[0]
    path = models / "objects" / f"{sha256}.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(content[:-9] if damage == "short" else content[:-1] + b"x")
    with pytest.raises(IntegrityError, match=f"shared tensors {sha256[:12]}"):
        lineage.fetch_model(LOCAL, str(models), names[1], tmp_path / "copy")


def test_a_model_of_another_shape_shares_nothing(store, tmp_path):
    models, names = store(3)
    folder = tmp_path / "other"
    checkpoint.save(folder, "model", {"trunk": KEPT}, {})
    shared.upload(*checkpoint.load(folder, "model"), LOCAL, str(models), "other", names[-1])
    copy = lineage.fetch_model(LOCAL, str(models), "other", tmp_path / "copy")
    assert checkpoint.load(copy, "model")[0].keys() == {"trunk"}


def test_a_model_after_one_of_the_old_format_goes_on(store, tmp_path):
    models, _ = store(1)
    checkpoint.upload(tmp_path / "local" / "m0", LOCAL, str(models / "old"))
    folder = tmp_path / "new"
    checkpoint.save(folder, "model", tensors_of(2), {})
    shared.upload(*checkpoint.load(folder, "model"), LOCAL, str(models), "new", "old")
    assert len(shared.parts_of(fields(models, "new"))) == 1
    for name, count in (("old", 1), ("new", 2)):
        copy = lineage.fetch_model(LOCAL, str(models), name, tmp_path / "copy" / name)
        assert checkpoint.load(copy, "model")[0].keys() == tensors_of(count).keys()


def test_models_are_copied_with_what_they_share(store, tmp_path):
    models, names = store(3)
    shared.copy_model(models, names[2], LOCAL, str(tmp_path / "elsewhere"))
    copy = lineage.fetch_model(LOCAL, str(tmp_path / "elsewhere"), names[2], tmp_path / "copy")
    assert checkpoint.load(copy, "model")[0].keys() == tensors_of(3).keys()
    assert not list(Path(tmp_path / "elsewhere").glob("**/*.draft"))
