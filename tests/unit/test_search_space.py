"""Spaces from YAML: what is meant, and a clear message for everything that cannot be meant."""

import dataclasses
import json

import pytest

from partialhn.config import Config, HypernetConfig
from partialhn.errors import InputError
from pipelines.search.settings import Budget, SearchConfig, parse_budget
from pipelines.search.space import Choice, Range, applies, load_space, parse_space

BASE = Config()


def test_the_default_space_has_what_a_user_would_search():
    space = parse_space({}, BASE)
    assert space.depths() == [0, 1, 2, 3, 4]
    assert {"hypernet.embedding_dim", "hypernet.hidden", "hypernet.fresh_columns",
            "hypernet.generator", "hypernet.beta", "hypernet.norm", "train.learning_rate",
            "features.views"} < set(space.dimensions)
    assert "train.epochs" not in space.dimensions  # a budget that fits the data is not searched
    fixed = dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, epochs=8))
    assert parse_space({}, fixed).dimensions["train.epochs"].values == (8, 4)
    assert space.dimensions["train.learning_rate"] == Range(
        BASE.train.learning_rate / 3, BASE.train.learning_rate * 3, log=True, whole=False)
    assert len(space.grid_points()) == 5


def test_what_starts_from_the_networks_weights_keeps_their_norm():
    base = dataclasses.replace(BASE, hypernet=HypernetConfig(starts_from="network"))
    assert set(parse_space({}, base).dimensions) == {
        "backbone.freeze_depth", "hypernet.fresh_columns", "train.learning_rate", "features.views"}
    assert parse_space({}, base).dimensions["train.learning_rate"].high == pytest.approx(
        1.5 * base.train.learning_rate)  # above it such heads diverge
    asked = parse_space({"hypernet.norm": {"choice": ["batch", "group"]}}, base)
    assert asked.dimensions["hypernet.norm"] == Choice(("batch", "group"))


def test_a_file_overrides_single_keys(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("hypernet.beta: {loguniform: [1e-3, 1]}\n"
                    "train.epochs: {uniform: [2, 6]}\n"
                    "train.learning_rate: {uniform: [0.001, 0.01]}\n"
                    "hypernet.norm: batch\n"
                    "hypernet.hidden: {choice: [[50, 32], [10]]}\n"
                    "backbone.freeze_depth: {grid: [2, 4]}\n", encoding="utf-8")
    space = load_space(str(path), BASE, None)
    assert space.dimensions["hypernet.beta"] == Range(0.001, 1, log=True, whole=False)
    assert space.dimensions["train.epochs"] == Range(2, 6, log=False, whole=True)
    assert space.dimensions["hypernet.hidden"] == Choice(((50, 32), (10,)))
    assert space.fixed == {"hypernet.norm": "batch"}
    assert space.grid_points() == [{"backbone.freeze_depth": 2}, {"backbone.freeze_depth": 4}]
    assert "hypernet.generator" in space.dimensions
    config = space.config(BASE, {"hypernet.hidden": (10,), "train.epochs": 3})
    assert (config.hypernet.hidden, config.train.epochs, config.hypernet.norm) == (
        (10,), 3, "batch")


def test_defaults_false_keeps_only_what_is_said_and_the_depths():
    space = parse_space({"defaults": False, "hypernet.beta": {"uniform": [0, 1]}}, BASE)
    assert set(space.dimensions) == {"hypernet.beta", "backbone.freeze_depth"}


def test_two_grids_are_crossed():
    space = parse_space({"defaults": False, "backbone.freeze_depth": {"grid": [1, 2]},
                         "hypernet.norm": {"grid": ["batch", "group"]}}, BASE)
    assert len(space.grid_points()) == 4


def test_depths_on_the_command_line_win():
    assert parse_space({"backbone.freeze_depth": {"choice": [1, 2]}}, BASE, (3,)).depths() == [3]
    assert parse_space({"backbone.freeze_depth": 1}, BASE, (3, 4)).depths() == [3, 4]
    assert parse_space({"backbone.freeze_depth": 2}, BASE).depths() == [2]
    assert parse_space({"backbone.freeze_depth": {"uniform": [1, 3]}}, BASE).depths() == [1, 2, 3]


def test_a_space_survives_json():
    space = parse_space({"hypernet.norm": "batch", "train.epochs": {"uniform": [2, 6]}}, BASE)
    again = parse_space(json.loads(json.dumps(space.to_dict())), BASE)
    assert again == space


@pytest.mark.parametrize(("values", "parts"), [
    ({"hypernet.betta": {"uniform": [0, 1]}}, ["hypernet.betta", "no configuration key"]),
    ({"data.input_size": {"choice": [16, 32]}}, ["data.input_size", "same for every trial"]),
    ({"features.augment": "crop"}, ["features.augment", "same for every trial"]),
    ({"hypernet.beta": {"normal": [0, 1]}}, ["hypernet.beta", "normal", "loguniform"]),
    ({"hypernet.beta": {"uniform": [1, 0]}}, ["hypernet.beta", "low < high"]),
    ({"hypernet.beta": {"loguniform": [0, 1]}}, ["hypernet.beta", "above 0"]),
    ({"hypernet.beta": {"uniform": [-1, 1]}}, ["hypernet.beta", "-1", "0 or more"]),
    ({"hypernet.beta": {"uniform": [0, 1, 2]}}, ["hypernet.beta", "low < high"]),
    ({"hypernet.beta": {"choice": []}}, ["hypernet.beta", "a list"]),
    ({"hypernet.norm": {"uniform": [0, 1]}}, ["hypernet.norm", "choice or grid"]),
    ({"hypernet.norm": {"choice": ["batch", "batsch"]}}, ["hypernet.norm", "batsch", "instance"]),
    ({"train.epochs": {"uniform": [1, 2.5]}}, ["train.epochs", "whole numbers"]),
    ({"train.epochs": "many"}, ["train.epochs", "many", "int"]),
    ({"defaults": "no"}, ["defaults", "true, false"]),
])
def test_what_cannot_be_meant_is_named(values, parts):
    with pytest.raises(InputError) as caught:
        parse_space(values, BASE)
    for part in parts:
        assert part in str(caught.value)


def test_a_value_needs_only_one_partner_that_goes_with_it():
    base = dataclasses.replace(BASE, hypernet=HypernetConfig(generator="additive"))
    space = parse_space({"hypernet.residual": {"choice": [True, False]},
                         "hypernet.generator": {"choice": ["columns", "bilinear"]}}, base)
    assert space.dimensions["hypernet.residual"] == Choice((True, False))
    with pytest.raises(InputError, match=r"hypernet.residual.*residual is False"):
        parse_space({"hypernet.residual": {"choice": [False]}, "hypernet.generator": "columns"},
                    base)


def test_keys_that_mean_nothing_are_left_out():
    assert applies("hypernet.hidden", {"hypernet.generator": "additive"}, BASE)
    assert not applies("hypernet.hidden", {"hypernet.generator": "bilinear"}, BASE)
    assert applies("hypernet.beta", {"hypernet.generator": "bilinear"}, BASE)
    assert not applies("hypernet.beta", {}, BASE)
    assert not applies("hypernet.hidden", {}, BASE)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", None])
def test_a_broken_space_file_is_named(tmp_path, content):
    path = tmp_path / "space.yaml"
    if content:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"space\.yaml"):
        load_space(str(path), BASE, None)


# Options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "budget"), [
    ("30min", Budget(seconds=1800)), ("2h", Budget(seconds=7200)), ("90s", Budget(seconds=90)),
    ("1.5 h", Budget(seconds=5400)), ("200-trials", Budget(trials=200)),
    ("1-trial", Budget(trials=1))])
def test_budgets(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "30", "0min", "0-trials", "min", "2 days", "-3-trials"])
def test_budgets_that_are_none(text):
    with pytest.raises(InputError, match="30min or 2h"):
        parse_budget(text)


@pytest.mark.parametrize(("options", "part"), [
    ({"max_loss": 2.0}, "max_loss"), ({"seeds": 0}, "seeds"), ({"depths": (1, 1)}, "depths"),
    ({"price_gpu_hour": 1.0}, "price_gib_month"), ({"cpus_per_trial": 0.0}, "cpus_per_trial"),
    ({"name": "a b"}, "name"), ({"resume": "a/b"}, "a/b"), ({"output": ""}, "output"),
    ({"tasks_a_month": 0.0}, "tasks_a_month is 0.0; allowed: 0.01 to")])
def test_options_out_of_range_are_named(options, part):
    with pytest.raises(InputError, match=part):
        SearchConfig(**options)


def test_a_resumed_search_remembers_its_options():
    saved = SearchConfig(objective="cost", budget="10-trials", sampler_seed=3).remembered()
    assert SearchConfig(resume="x").changed(saved) == saved
    again = SearchConfig(resume="x", budget="20-trials", objective="balanced").changed(saved)
    assert again == saved | {"budget": "20-trials", "objective": "balanced"}
    with pytest.raises(InputError, match="sampler_seed is 4"):
        SearchConfig(resume="x", sampler_seed=4).changed(saved)
