"""Names of stored results: version 0.1.0 fixed them, and a new option must not change them."""

import dataclasses
import hashlib
import json

import numpy as np
import pyarrow.fs as pafs
import pytest

from partialhn.config import Config, TrainConfig
from partialhn.data.experience import Experience
from partialhn.data.image_table import ImageTable
from partialhn.features.manifest import FeatureRecipe
from partialhn.naming import FIRST_DEFAULT, FIRST_OPTIONS, digest, digest_text, named_values
from partialhn.training.lineage import lineage_ids_of
from partialhn.training.pretrain import network_key
from partialhn.training.slots import Slot

OTHER = Config.from_dict({
    "data": {"tasks": 3, "input_size": 16}, "backbone": {"freeze_depth": 2},
    "features": {"views": 1, "augment": "none", "compression": "lz4"},
    "hypernet": {"hidden": [64, 32]},
    "train": {"strategy": "ewc", "ewc_strength": 5.0, "compare": ["naive"]}})
RECIPE = FeatureRecipe("t" * 64, "d" * 64, "none", 32, 2, "crop-flip", 0, "float16", 1024)
# What version 0.1.0 named these (commit 4084f75). Users' stores hold such names: a change here
# means that everything is learned and computed again.
GOLDEN = {
    "default": (Config().with_first_values(),
                ("d53c0bade1aa5687771eef180c9ce4f0", "546afa303a35f2dc2da293a10eb29ed9"),
                "11d6eaa2832154b897691950d51a5a8a", "26936b0a472b"),
    "other": (OTHER.with_first_values(),
              ("14281d1d47cf839df4340b5d593666ac", "8c79c3c8c79f8c93354f9df5a5310120"),
              "c34f7cac7bb0bf52ba324d271e86eb15", "d58ba13c25bd")}


@pytest.fixture
def first(tmp_path):
    """A first task of four files."""
    for row in range(4):
        (tmp_path / str(row)).write_bytes(f"image {row}".encode())

    def table(*rows):
        return ImageTable(pafs.LocalFileSystem(), tuple(str(tmp_path / str(row)) for row in rows),
                          np.arange(len(rows)), np.full(len(rows), -1), np.arange(len(rows)) % 2)
    return Experience("0", ("a", "b"), table(0, 1), table(2), table(3))


def names(config, first):
    """Lineage ids of two tasks, the trained network's key, and the work hash."""
    slots = [Slot("0", ("a", "b"), first.fingerprint, "none", {}),
             Slot("1", ("c",), "f" * 64, "blur", {})]
    return (lineage_ids_of(config, "n" * 64, slots), network_key(config, first),
            config.work_hash())


@pytest.mark.parametrize("case", GOLDEN)
def test_names_of_version_0_1_stay(case, first):
    config, *expected = GOLDEN[case]
    assert names(config, first) == tuple(expected)


def test_fingerprints_and_feature_keys_of_version_0_1_stay(first):
    assert first.fingerprint == ("2c7447b225a62335bef6cae08d7f1454"
                                 "a57d2e06be3796ecbd5215d0f97dcfce")
    assert RECIPE.key == "57916e7ea0c032a7ffeb4e80e15befc3"
    assert dataclasses.replace(RECIPE, compression="lz4").key == (
        "af1f8d3dad7dfabe49abed03a665edbe")


def with_option(config, section, key, value, default=7, **metadata):
    """The configuration where a section's class has one option more."""
    options = getattr(config, section)
    newer = dataclasses.make_dataclass(
        f"Newer{section}", [(key, int, dataclasses.field(default=default, metadata=metadata))],
        bases=(type(options),), frozen=True)
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return dataclasses.replace(config, **{section: newer(**values, **{key: value})})


@pytest.mark.parametrize("section", FIRST_OPTIONS)
@pytest.mark.parametrize("config", [Config(), OTHER])
def test_a_new_option_at_its_default_renames_nothing(section, config, first):
    assert names(with_option(config, section, "brand_new", 7), first) == names(config, first)


@pytest.mark.parametrize(("section", "renamed"), [
    ("train", (True, False, True)), ("hypernet", (True, False, True)),
    ("features", (True, False, True)), ("backbone", (False, True, True)),
    ("data", (False, False, True)), ("compute", (False, False, False))])
def test_a_new_option_at_another_value_renames_what_depends_on_it(section, renamed, first):
    changed = names(with_option(Config(), section, "brand_new", 8), first)
    assert tuple(new != old for new, old in zip(changed, names(Config(), first),
                                                strict=True)) == renamed


def test_a_changed_default_gives_no_value_the_name_of_another(first):
    def named(value, default):
        return names(with_option(Config(), "train", "brand_new", value, default,
                                 **{FIRST_DEFAULT: 7}), first)
    assert named(7, default=9) == names(Config(), first)
    assert named(9, default=9) != names(Config(), first)


def test_a_new_field_of_a_recipe_at_its_default_keeps_the_key():
    newer = dataclasses.make_dataclass("Newer", [("brand_new", int, 7)], bases=(FeatureRecipe,),
                                       frozen=True)
    values = dataclasses.asdict(RECIPE)
    assert newer(**values).key == RECIPE.key
    assert newer(**values, brand_new=8).key != RECIPE.key


def test_every_option_is_of_version_0_1_or_has_a_default_that_names_leave_out():
    for section, first_options in FIRST_OPTIONS.items():
        options = getattr(Config(), section)
        assert first_options <= {field.name for field in dataclasses.fields(options)}
        assert set(named_values(options, first_options)) == first_options


def test_an_option_of_version_0_1_is_named_at_its_default_too():
    assert named_values(TrainConfig(), FIRST_OPTIONS["train"])["epochs"] == TrainConfig().epochs


def test_a_digest_is_that_of_json_with_sorted_keys():
    values = {"b": [1, None], "a": 0.5}
    whole = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert digest(values) == whole
    assert digest(dict(reversed(values.items())), 12) == whole[:12]
    assert digest_text("ä", 8) == hashlib.sha256("ä".encode()).hexdigest()[:8]
