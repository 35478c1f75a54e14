"""A whole stream in one process, on real digits."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from partialhn.config import Config
from partialhn.errors import InputError
from partialhn.networks.tensors import hash_tensors
from partialhn.run import run_stream
from partialhn.training.records import EpochRecord, TaskRecord

pytestmark = pytest.mark.trains
CONFIG = Config.from_dict({
    "data": {"data": "digits", "tasks": 5, "input_size": 16},
    "backbone": {"freeze_depth": 3, "trunk_epochs": 2, "trunk_batch_size": 32},
    "features": {"views": 1, "augment": "crop"},
    "hypernet": {"fresh_columns": 4},
    "train": {"epochs": 3, "compare": ["separate_heads", "naive"]},
})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(root, records, model, fields) of a first run."""
    root, records = tmp_path_factory.mktemp("run"), []
    result = run_stream(CONFIG, root, records.append)
    return root, records, result.model, result.fields


def test_fields_agree_with_the_matrix(run):
    fields = run[3]
    R = fields["accuracy_matrix"]
    assert [[value is not None for value in row] for row in R] == [
        [j <= i for j in range(5)] for i in range(5)]
    assert fields["acc"] == pytest.approx(sum(R[4]) / 5)
    assert fields["learning_accuracy"] == pytest.approx(sum(R[j][j] for j in range(5)) / 5)
    assert fields["bwt"] == pytest.approx(sum(R[4][j] - R[j][j] for j in range(4)) / 4)
    best = [max(R[i][j] for i in range(j, 5)) for j in range(4)]
    assert fields["forgetting"] == pytest.approx(sum(best[j] - R[4][j] for j in range(4)) / 4)
    assert fields["forgetting"] == 0
    assert fields["acc"] > 0.6, "0.74 to 0.91 under five seeds"


def test_fields_describe_the_run(run):
    root, _, model, fields = run
    assert Config.from_dict(json.loads(json.dumps(fields))["config"]) == CONFIG
    assert (fields["strategy"], fields["seed"]) == ("partial_hn", 0)
    total = sum(task[f"{split}_images"] for task in fields["tasks"]
                for split in ("train", "validation", "test"))
    assert total == fields["images_decoded"] == 1797
    assert {name for task in fields["tasks"] for name in task["classes"]} == set("0123456789")
    stages = fields["seconds"]["stages"]
    assert set(stages) >= {"data", "trunk", "features", "train"}
    assert fields["seconds"]["total"] == pytest.approx(sum(stages.values()), abs=0.01)
    assert [task["name"] for task in fields["seconds"]["per_task"]] == list("01234")
    folders = list((root / "features").iterdir())
    assert {folder.name for folder in folders} == set(fields["feature_keys"])
    size = sum(path.stat().st_size for path in root.glob("features/*/*.arrow"))
    assert fields["feature_bytes"] == size
    assert 0 < fields["macs"]["frozen_share"] < 1
    assert fields["bounds"].keys() == {"separate_heads", "naive"}
    assert fields["bounds"]["separate_heads"]["forgetting"] == 0
    assert fields["bounds"]["separate_heads"]["bytes_per_task"] > fields["bytes_per_task"]
    assert fields["weights_hash"] == model.weights_hash() == hash_tensors(model.tensors())
    assert len(fields["epochs"]) == 15
    assert fields["notes"] == []  # the trunk learned from enough images


def test_records_come_while_it_runs(run):
    records = run[1]
    assert [r.task for r in records[:2]] == ["trunk", "trunk"]
    ours = records[2:2 + 5 * 4]
    assert [isinstance(record, TaskRecord) for record in ours] == [False, False, False, True] * 5
    assert len(records) == 2 + 3 * 20
    assert all(isinstance(record, EpochRecord | TaskRecord) for record in records)


def test_a_second_run_finds_trunk_and_features(run):
    root, _, _, first = run
    records = []
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, compare=()))
    fields = run_stream(config, root, records.append).fields
    assert fields["images_decoded"] == 0
    assert not [record for record in records if record.task == "trunk"]
    for key in ("feature_keys", "feature_bytes", "accuracy_matrix", "weights_hash", "macs"):
        assert fields[key] == first[key]
    assert not list(root.glob("trunks/*.partial"))


def test_predictions_agree_with_the_matrix(run, tmp_path):
    from partialhn.data.datasets import open_stream
    from partialhn.predict import Predictor

    root, _, model, fields = run
    model.save(tmp_path / "model")
    predictor = Predictor.load(tmp_path / "model")
    for index, experience in enumerate(open_stream(CONFIG.data, root / "datasets")):
        found = predictor.predict(experience.test.read(), experience.name)
        truth = [experience.classes[label] for label in experience.test.label_N]
        right = np.mean([mine == theirs
                         for mine, theirs in zip(found.labels, truth, strict=True)])
        # features are stored as float16; a close call may fall the other way
        assert abs(right - fields["accuracy_matrix"][-1][index]) <= 1.5 / len(truth)


@pytest.mark.parametrize(("section", "values", "message"), [
    ("backbone", {"freeze_depth": 5}, "freeze_depth is 5"),
    ("backbone", {"backbone": "vgg16"}, "backbone is 'vgg16'"),
    ("hypernet", {"norm": "group", "norm_groups": 7}, "norm_groups is 7"),
    ("backbone", {"trunk": "none.safetensors"}, "which is no file"),
    ("data", {"tasks": 11}, "tasks is 11"),
    ("data", {"data": "/nowhere"}, "/nowhere"),
])
def test_bad_input_is_refused_before_any_training(run, section, values, message):
    options = CONFIG.to_dict()
    options[section] |= values
    with pytest.raises(InputError, match=message):
        run_stream(Config.from_dict(options), run[0], lambda record: pytest.fail("trained"))


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_given_tasks_of_image_folders_at_full_depth(tmp_path, images):
    """Two tasks of their own classes, depth 4: only classifiers are learned."""
    for task, classes in (("first", ("a", "b")), ("second", ("c", "d", "e"))):
        for split, count in (("train", 6), ("test", 2)):
            for number, name in enumerate(classes):
                folder = tmp_path / "data" / task / split / name
                folder.mkdir(parents=True)
                for k in range(count):
                    pixels = images[number + 5 * k].permute(1, 2, 0).numpy()
                    (folder / f"{k}.png").write_bytes(encoded(pixels))
    config = Config.from_dict({
        "data": {"data": str(tmp_path / "data"), "input_size": 16},
        "backbone": {"freeze_depth": 4, "trunk_epochs": 1},
        "features": {"views": 1, "augment": "none"}, "train": {"epochs": 1, "batch_size": 4}})
    result = run_stream(config, tmp_path / "root")
    model, fields = result.model, result.fields
    assert [record.task for record in result.records] == ["first", "second"]
    assert [task.name for task in model.tasks] == ["first", "second"]
    assert [len(task.classes) for task in model.tasks] == [2, 3]
    assert fields["macs"]["frozen_share"] > 0.99


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_stream_is_learned_from_any_number_type(run, dtype):
    """About as well as from float16; and compressed it is the same stream, learned already."""
    root, _, _, wanted = run
    train = dataclasses.replace(CONFIG.train, compare=())
    config = dataclasses.replace(CONFIG, train=train, features=dataclasses.replace(
        CONFIG.features, feature_dtype=dtype))
    found = run_stream(config, root).fields
    assert found["acc"] == pytest.approx(wanted["acc"], abs=0.04)
    assert found["without_task_id"]["acc"] == pytest.approx(
        wanted["without_task_id"]["acc"], abs=0.06)
    packed = dataclasses.replace(config, features=dataclasses.replace(config.features,
                                                                      compression="lz4"))
    again = run_stream(packed, root).fields
    assert again["weights_hash"] == found["weights_hash"]
    assert again["images_decoded"] == sum(task["test_images"] for task in again["tasks"])


def test_the_same_classes_in_changing_images(tmp_path):
    """A domain-incremental stream: every task has all ten digits, and a head of its own."""
    values = CONFIG.to_dict()
    values["data"] |= {"tasks": None, "stream": "domains", "images_per_class": 40,
                       "task_transforms": ["none", "solarise", "grey+blur+autocontrast"]}
    values["backbone"]["freeze_depth"] = 4
    values["train"] |= {"compare": ["latent_replay"], "epochs": 2}
    with pytest.warns(UserWarning, match="the trunk learned from [0-9]+ images of task '0' alone"):
        result = run_stream(Config.from_dict(values), tmp_path)
    model, fields = result.model, result.fields
    assert any("the trunk learned from" in note for note in fields["notes"])
    assert [len(task.classes) for task in model.tasks] == [10, 10, 10]
    assert [task["transform"] for task in fields["tasks"]] == values["data"]["task_transforms"]
    assert fields["forgetting"] == 0
    detector = sum(map(model.inference.task_bytes, range(3))) / 3
    assert fields["bounds"]["latent_replay"]["bytes_per_task"] > fields["bytes_per_task"] - detector
