"""Recorded searches on real photographs: large, quick, and honest about what they cannot tell."""

import json
from pathlib import Path

import pytest

SEARCHES = json.loads((Path(__file__).parent / "tune-tiny-imagenet.json").read_text(
    encoding="utf-8"))["searches"]


@pytest.mark.parametrize("name", SEARCHES)
def test_a_recorded_search_is_large_and_quick_enough(name):
    search = SEARCHES[name]
    assert search["trials"] >= 40
    assert search["stopped_early"] > 0
    assert search["failed"] == 0
    assert search["processor_seconds"] < 45 * 60
    assert {each["depth"] for each in search["depths"]} == {1, 2, 3, 4}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_forecast_orders_the_depths_nearly_as_the_search_found_them(name):
    """Layers 1 and 2 change places: above the first there is most to learn in two epochs."""
    assert SEARCHES[name]["forecast"]["rank_correlation"] >= 0.79


def test_the_recommendation_does_not_depend_on_the_samplers_seed():
    seeds = {each["sampler_seed"] for each in SEARCHES.values() if each["algorithm"] == "tpe"}
    assert seeds >= {0, 1}
    assert {each["recommended_depth"] for each in SEARCHES.values()} == {2}
    assert all(each["votes"] == {"2": 3} for each in SEARCHES.values())
