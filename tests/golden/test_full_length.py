"""Streams at their full length, as they were recorded: what the page of results says of them."""

import json
from pathlib import Path

import pytest


def recorded(name):
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


RECORDED, TWENTY = recorded("split-cifar10"), recorded("split-tiny-imagenet")
RESULTS = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")


def test_it_is_as_accurate_as_the_published_full_hypernetwork():
    separate = RECORDED["bounds"]["separate_heads"]
    assert RECORDED["acc"] >= 0.93
    assert RECORDED["acc"] >= separate["acc"] - 0.01
    assert RECORDED["forgetting"] == 0
    assert RECORDED["bytes_per_task"] <= 0.02 * separate["bytes_per_task"]


def test_nothing_frozen_is_above_the_published_full_hypernetwork_and_freezing_costs_little():
    """Published (ResNet-32, nothing frozen): 0.9377."""
    full = RECORDED["bounds"]["full_hn"]
    assert full["acc"] > 0.9377
    assert full["forgetting"] == 0
    assert RECORDED["acc"] > full["acc"] - 0.02


@pytest.mark.parametrize("of", ["acc", "full_hn", "separate_heads", "latent_replay"])
def test_the_page_says_what_was_recorded(of):
    part = RESULTS[RESULTS.index("Split CIFAR-10 at its full length"):]
    part = part[:part.index("\n## ")]
    found = RECORDED if of == "acc" else RECORDED["bounds"][of]
    assert f"{100 * found['acc']:.1f} %" in part
    words = RECORDED["command"].removeprefix("partialhn train ").removesuffix(" --threads 1")
    assert words in part.replace(" \\\n ", "")


def test_twenty_tasks_are_learned_nearly_as_well_as_by_separate_heads():
    separate = TWENTY["bounds"]["separate_heads"]
    assert len(TWENTY["accuracy_matrix"]) == 20
    assert TWENTY["acc"] >= separate["acc"] - 0.01
    assert TWENTY["forgetting"] == 0
    assert TWENTY["bytes_per_task"] <= 0.02 * separate["bytes_per_task"]
    for found in (TWENTY, *TWENTY["bounds"].values()):
        assert f"{100 * found['acc']:.1f} %" in RESULTS


@pytest.mark.parametrize("recorded", [RECORDED, TWENTY], ids=["CIFAR-10", "Tiny-ImageNet"])
def test_with_all_images_it_is_far_ahead_of_latent_replay(recorded):
    replay = recorded["bounds"]["latent_replay"]
    assert recorded["acc"] > replay["acc"] + 0.05
    assert replay["forgetting"] > 0.05
