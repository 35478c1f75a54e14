"""Options: strict types, names and limits; what names a run's work."""

import dataclasses
import itertools
import json
import math

import pytest

from partialhn import config as options
from partialhn.config import Config, HypernetConfig, load_config
from partialhn.errors import InputError

LIMITS = {
    "data.data": [""],
    "data.tasks": [0, -1],
    "data.task_sizes": [[3, 0]],
    "data.classes": [1],
    "data.stream": ["instances"],
    "data.images_per_class": [1],
    "data.input_size": [7, 1025],
    "data.validation": [-0.1, 0.51],
    "data.test": [0.0, 0.51],
    "data.max_image_pixels": [63],
    "data.stream_seed": [-1],
    "data.class_order": ["sorted"],
    "backbone.freeze_depth": [-1],
    "backbone.trunk_epochs": [0],
    "backbone.trunk_min_steps": [0],
    "backbone.trunk_max_steps": [0, 399],
    "backbone.trunk_batch_size": [1],
    "backbone.trunk_learning_rate": [0.0, -1.0, math.nan],
    "backbone.trunk_seed": [-1],
    "backbone.adapt_trunk": [True],
    "backbone.adapt_learning_rate": [0.0],
    "backbone.trunk_precision": ["half"],
    "backbone.trunk_arithmetic": ["float32"],
    "features.views": [0, 65],
    "features.shard_rows": [0],
    "features.augment": ["none", "rotate"],
    "features.feature_dtype": ["float64"],
    "features.compression": ["zstd"],
    "hypernet.generator": ["trilinear"],
    "hypernet.code_dim": [0],
    "hypernet.starts_from": ["last"],
    "hypernet.generate": [""],
    "hypernet.fresh_columns": [-1, 0],
    "hypernet.dictionary": [-1],
    "hypernet.dictionary_after": [0],
    "hypernet.embedding_dim": [0],
    "data.image_column": [""],
    "data.label_column": [""],
    "hypernet.channel_dim": [0],
    "hypernet.hidden": [[], [0]],
    "hypernet.norm": ["none"],
    "hypernet.norm_groups": [0],
    "hypernet.beta": [-0.1, math.nan],
    "train.strategy": ["full_hn"],
    "train.compare": [["partial_hn"], ["full_hn"]],
    "train.buffer": [0],
    "train.ewc_strength": [-0.1, math.nan],
    "train.lwf_strength": [-0.1, math.nan],
    "train.detector_features": [-1, 100_001],
    "train.false_alarms": [-0.1, 1.0, math.nan],
    "train.epochs": [0],
    "train.min_steps": [0],
    "train.max_steps": [0, 299],
    "train.closed_form": ["always"],
    "train.batch_size": [1],
    "train.learning_rate": [0.0, math.nan],
    "train.schedule": ["linear"],
    "train.precision": ["float16", "bf16"],
    "train.label_smoothing": [-0.1, 0.6], "train.strategy_options": [["share=0.3"]],
    "train.seed": [-1],
    "compute.tasks_at_once": [0],
    "compute.workers": [0],
    "compute.share": ["epochs"],
    "compute.device": ["tpu"],
    "compute.feature_workers": [0],
    "compute.threads": [0],
    "compute.cache": [""],
    "compute.cache_gib": [0],
}
FREE = {"data.task_transforms", "data.on_bad_image", "backbone.backbone", "backbone.trunk",
        "hypernet.residual", "compute.ray_address", "compute.cuda_graphs", "compute.re_evaluate"}
"""Checked where they are used, or unlimited."""


def nested(key, value):
    section, name = key.split(".")
    return {section: {name: value}}


def every_key():
    return {f"{section.name}.{field.name}" for section in dataclasses.fields(Config)
            for field in dataclasses.fields(section.default_factory)}


def test_every_option_has_its_limits_here():
    assert every_key() >= LIMITS.keys() | FREE
    assert every_key() - LIMITS.keys() - FREE == set()


@pytest.mark.parametrize(("key", "value"), [
    pytest.param(key, value, id=f"{key}={value}")
    for key, values in LIMITS.items() for value in values])
def test_out_of_range_names_key_value_and_what_is_allowed(key, value):
    with pytest.raises(InputError) as caught:
        Config.from_dict(nested(key, value))
    message = str(caught.value)
    assert key.split(".")[1] in message
    assert "allowed: " in message
    shown = value if not isinstance(value, list) else (value or [()])[-1]
    assert str(shown) in message


@pytest.mark.parametrize("key", sorted(every_key()))
def test_a_wrong_type_is_refused_for_every_option(key):
    for value in ({"a": 1}, object()):
        with pytest.raises(InputError, match=key.replace(".", r"\.")):
            Config.from_dict(nested(key, value))


@pytest.mark.parametrize(("key", "value"), [
    ("train.epochs", "3"), ("train.epochs", 1.5), ("train.epochs", True),
    ("train.batch_size", None),
    ("train.learning_rate", "fast"), ("train.learning_rate", True),
    ("hypernet.residual", 1), ("hypernet.residual", "yes"), ("data.data", 3),
    ("data.task_sizes", 3), ("data.task_sizes", ["2", "3"]), ("hypernet.hidden", [1.5]),
])
def test_values_are_not_converted(key, value):
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        Config.from_dict(nested(key, value))


def test_whole_numbers_serve_as_floats_and_none_as_absent():
    config = Config.from_dict({"train": {"learning_rate": 1}, "data": {"tasks": None}})
    assert config.train.learning_rate == 1.0
    assert isinstance(config.train.learning_rate, float)
    assert config.data.tasks is None


@pytest.mark.parametrize("values", [{"trian": {}}, {"train": {"epoch": 3}}, {3: 4}])
def test_unknown_keys_are_named_with_those_allowed(values):
    with pytest.raises(InputError, match=r"unknown configuration key (trian|train\.epoch|3); "
                                         r"allowed: .*(train, |train\.epochs)"):
        Config.from_dict(values)


def test_a_section_must_be_a_section():
    with pytest.raises(InputError, match="train is 3; allowed: a section"):
        Config.from_dict({"train": 3})


def test_options_that_contradict_each_other():
    for values, message in [
        ({"data": {"tasks": 3, "task_sizes": [1, 2]}}, "one count for each of the 3 tasks"),
        ({"train": {"strategy": "naive", "compare": ["naive"]}}, "other than the strategy"),
        ({"hypernet": {"residual": False}}, "residual is False; allowed: true with generator col"),
        ({"hypernet": {"generator": "bilinear", "dictionary": 8}},
         "dictionary is 8; allowed: 0 with generator bilinear, or generator columns"),
        ({"features": {"views": 2, "augment": "none"}}, "views is more than 1"),
    ]:
        with pytest.raises(InputError, match=message):
            Config.from_dict(values)
    assert Config.from_dict({"features": {"views": 1, "augment": "none"}}).features.views == 1


def test_dict_round_trip_through_json():
    config = Config.from_dict({"data": {"task_sizes": [2, 3], "tasks": 2, "input_size": 16},
                               "hypernet": {"hidden": [7], "beta": 0.25},
                               "train": {"compare": ["naive", "separate_heads"]}})
    assert config.hypernet.hidden == (7,)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert Config.from_dict(Config().to_dict()) == Config()


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_yaml_fills_the_same_classes(tmp_path):
    path = write(tmp_path / "a.yaml", "train:\n  epochs: 3\ndata:\n  task_sizes: [2, 2]\n")
    config = load_config(path)
    assert (config.train.epochs, config.data.task_sizes) == (3, (2, 2))
    assert config.backbone == options.BackboneConfig()


@pytest.mark.parametrize(("text", "message"), [
    ("train: [1", "is not YAML"),
    ("a: b: c", "is not YAML"),
    (b"\xff\xfe\x00\xd8", "cannot be read|is not YAML"),
    ("", "holds NoneType; allowed: the sections data, backbone"),
    ("[" * 5000, "is not YAML"),
    ("train: {epochs: 1}\ndata: {}\ntrain: {}\n", "the key 'train' stands there twice"),
    ("train: {epochs: 1, epochs: 2}", "the key 'epochs' stands there twice"),
    ("- train", "holds list"),
    ("trian: {}", "unknown configuration key trian"),
    ("train: {epochs: many}", r"train\.epochs is 'many'"),
    ("!!python/object/apply:os.getcwd []", "is not YAML"),
])
def test_broken_yaml_is_bad_input(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path / "a.yaml", text))


def test_tables_of_yaml_may_be_merged(tmp_path):
    text = "train:\n  <<: {epochs: 3, seed: 1}\n  epochs: 4\n"
    config = load_config(write(tmp_path / "a.yaml", text))
    assert (config.train.epochs, config.train.seed) == (4, 1)


def test_a_missing_file_and_a_folder_are_bad_input(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match=r"cannot be read: .*; give the path"):
            load_config(path)


def changed(config, key, value):
    section, name = key.split(".")
    part = dataclasses.replace(getattr(config, section), **{name: value})
    return dataclasses.replace(config, **{section: part})


def test_work_hash_ignores_what_changes_nothing():
    config = Config()
    for key, value in [("compute.workers", 2), ("compute.device", "cpu"), ("compute.threads", 7),
                       ("compute.share", "batches"),
                       ("compute.ray_address", "auto"),
                       ("compute.cuda_graphs", False), ("compute.re_evaluate", True),
                       ("data.data", "/elsewhere"),
                       ("features.compression", "lz4")]:
        assert changed(config, key, value).work_hash() == config.work_hash()


def test_work_hash_names_everything_else():
    config = Config(hypernet=HypernetConfig(generator="bilinear"))
    changes = {
        "data.stream": "domains", "data.images_per_class": 9,
        "data.tasks": 2, "data.class_order": "given", "data.task_sizes": (1, 1), "data.classes": 4,
        "data.input_size": 16,
        "data.validation": 0.2, "data.test": 0.3, "data.task_transforms": ("blur",),
        "data.on_bad_image": "skip", "data.max_image_pixels": 100, "data.stream_seed": 1,
        "backbone.backbone": "resnet18", "backbone.freeze_depth": 2, "backbone.trunk": "a",
        "backbone.trunk_epochs": 2, "backbone.trunk_min_steps": 3,
        "backbone.trunk_max_steps": 500, "backbone.trunk_batch_size": 2,
        "backbone.trunk_learning_rate": 0.1, "backbone.trunk_seed": 1,
        "backbone.adapt_learning_rate": 0.1,
        "backbone.trunk_precision": "bfloat16", "backbone.trunk_arithmetic": "tf32",
        "features.views": 3,
        "features.augment": "flip", "features.feature_dtype": "float32", "features.shard_rows": 2,
        "hypernet.generator": "additive", "hypernet.starts_from": "previous",
        "hypernet.code_dim": 8, "hypernet.fresh_columns": 2, "hypernet.embedding_dim": 16,
        "hypernet.dictionary_after": 5,
        "hypernet.hidden": (3,), "hypernet.channel_dim": 3, "hypernet.residual": False,
        "hypernet.norm": "layer", "hypernet.generate": "mlp", "hypernet.norm_groups": 2,
        "hypernet.beta": 0.5,
        "train.strategy": "naive", "train.compare": ("naive",), "train.epochs": 2,
        "train.closed_form": "never", "train.min_steps": 3, "train.max_steps": 400,
        "train.batch_size": 2, "train.learning_rate": 0.1, "train.schedule": "constant",
        "train.precision": "bfloat16", "train.label_smoothing": 0.1, "train.seed": 1,
        "train.buffer": 9,
        "train.ewc_strength": 2.0, "train.lwf_strength": 2.0,
        "train.detector_features": 9, "train.false_alarms": 0.1,
    }
    ours = {key for key in every_key() if not key.startswith("compute.")}
    ours -= {"backbone.adapt_trunk", "data.data", "data.image_column", "data.label_column",
             "features.compression", "hypernet.dictionary", "train.strategy_options"}
    assert changes.keys() == ours
    columns = Config()  # the dictionary needs columns, `residual` another generator
    assert changed(columns, "hypernet.dictionary", 24).work_hash() != columns.work_hash()
    hashes = [config.work_hash()] + [changed(config, key, value).work_hash()
                                     for key, value in changes.items()]
    assert all(a != b for a, b in itertools.combinations(hashes, 2))
