"""Streams at their full length, as they were recorded: what the README says of them."""

import json
from pathlib import Path

import pytest


def recorded(name):
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


RECORDED, TWENTY = recorded("split-cifar10"), recorded("split-tiny-imagenet")
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_it_is_as_accurate_as_the_published_full_hypernetwork():
    separate = RECORDED["bounds"]["separate_heads"]
    assert RECORDED["acc"] >= 0.93
    assert RECORDED["acc"] >= separate["acc"] - 0.01
    assert RECORDED["forgetting"] == 0
    assert RECORDED["bytes_per_task"] <= 0.02 * separate["bytes_per_task"]


@pytest.mark.parametrize("of", ["acc", "columns_16", "separate_heads"])
def test_the_readme_says_what_was_recorded(of):
    part = README[README.index("Split CIFAR-10 at its full length"):]
    part = part[:part.index("###")]
    found = {"acc": RECORDED, "columns_16": RECORDED["columns_16"],
             "separate_heads": RECORDED["bounds"]["separate_heads"]}[of]
    assert f"{100 * found['acc']:.1f} %" in part
    words = RECORDED["command"].removeprefix("partialhn train ").removesuffix(" --threads 1")
    assert words in part.replace(" \\\n ", "")


def test_twenty_tasks_are_learned_nearly_as_well_as_by_separate_heads():
    separate, naive = TWENTY["bounds"]["separate_heads"], TWENTY["bounds"]["naive"]
    assert len(TWENTY["accuracy_matrix"]) == 20
    assert TWENTY["acc"] >= 0.97 * separate["acc"]
    assert TWENTY["forgetting"] == 0
    assert TWENTY["bytes_per_task"] <= 0.02 * separate["bytes_per_task"]
    for found in (TWENTY, separate, naive):
        assert f"{100 * found['acc']:.1f} %" in README
