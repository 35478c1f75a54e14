"""Split CIFAR-10 at its full length, as it was recorded: what the README says of it."""

import json
from pathlib import Path

import pytest

RECORDED = json.loads((Path(__file__).parent / "split-cifar10.json").read_text(encoding="utf-8"))
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
