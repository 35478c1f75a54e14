"""Recorded packs: what their rows show, and that what the packs expect comes from them."""

import itertools
import json
from pathlib import Path

import pytest

from partialhn.benchmarks.catalogue import Cell, expected

FOLDER = Path(__file__).parent
RECORDED = {path.stem.removeprefix("pack-"): json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(FOLDER.glob("pack-*.json"))}
LEARNED = [name for name in RECORDED if not name.startswith("pretrained")]
"""Those whose trunk is trained on the first task; the others compare what forgets nothing."""
TOLERANCE = 0.03
"""Rounding differs between machines, and hundreds of test images have a standard error of 0.015."""


@pytest.mark.parametrize("name", RECORDED)
def test_expectations_are_the_recorded_means_and_a_tolerance(name):
    recorded = RECORDED[name]
    ranges = expected(recorded["pack"], recorded["size"])
    assert set(ranges) == {f"{row['label']}@{row['depth']}" for row in recorded["rows"]}
    for row in recorded["rows"]:
        wanted = (row["acc"]["mean"] - TOLERANCE, row["acc"]["mean"] + TOLERANCE)
        assert ranges[f"{row['label']}@{row['depth']}"] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", RECORDED)
def test_nothing_is_forgotten_where_nothing_is_shared(name):
    rows = {(row["label"], row["depth"]): row for row in RECORDED[name]["rows"]}
    for (label, _), row in rows.items():
        if label in ("partial_hn", "full_hn", "separate_heads", "linear_probe", "ridge",
                     "ncm"):
            assert max(row["forgetting"]["values"]) == 0


@pytest.mark.parametrize("name", LEARNED)
def test_replay_forgets_less_than_naive_training(name):
    rows = {(row["label"], row["depth"]): row for row in RECORDED[name]["rows"]}
    assert rows["naive", 3]["forgetting"]["mean"] > 0.02
    for label in ("joint", "latent_replay"):
        assert rows[label, 3]["forgetting"]["mean"] < rows["naive", 3]["forgetting"]["mean"]


@pytest.mark.parametrize("name", LEARNED)
def test_replay_is_behind_at_every_depth_of_every_stream(name):
    rows = {(row["label"], row["depth"]): row["acc"]["mean"] for row in RECORDED[name]["rows"]}
    for depth in {depth for _, depth in rows}:
        ours, replay = (rows[Cell(strategy, depth, 0).label, depth]
                        for strategy in ("partial_hn", "latent_replay"))
        assert ours > replay, depth


def test_every_stage_that_is_frozen_costs_something_and_saves_more():
    rows = {row["depth"]: row for row in RECORDED["split-cifar10-cpu"]["rows"]
            if row["label"] in ("partial_hn", "full_hn")}
    ordered = [rows[depth] for depth in sorted(rows)]
    for less, more in itertools.pairwise(ordered):
        assert 0 < less["acc"]["mean"] - more["acc"]["mean"] < 0.03
        assert more["cpu_seconds"] < less["cpu_seconds"] / 2


@pytest.mark.parametrize("name", LEARNED)
def test_the_hypernetwork_is_as_accurate_as_a_separate_head_at_a_fraction_of_its_bytes(name):
    rows = {(row["label"], row["depth"]): row for row in RECORDED[name]["rows"]}
    assert len(RECORDED[name]["rows"][0]["acc"]["values"]) == 3
    for depth in {depth for _, depth in rows}:
        ours, theirs = (rows[Cell(strategy, depth, 0).label, depth]
                        for strategy in ("partial_hn", "separate_heads"))
        assert ours["acc"]["mean"] > theirs["acc"]["mean"] - 0.01
        if depth < 4:
            assert ours["bytes_per_task"] < 0.02 * theirs["bytes_per_task"]


@pytest.mark.parametrize("name", sorted(set(RECORDED) - set(LEARNED)))
def test_on_a_trunk_trained_elsewhere_it_is_ahead_of_ridge_regression_on_the_best_features(name):
    rows = {(row["label"], row["depth"]): row for row in RECORDED[name]["rows"]}
    ours, theirs = rows["partial_hn", 12], rows["separate_heads", 12]
    assert len(ours["acc"]["values"]) == 3
    ridge = max(row["acc"]["mean"] for (label, _), row in rows.items() if label == "ridge")
    assert ridge + 0.01 < ours["acc"]["mean"] > theirs["acc"]["mean"] - 0.02
    assert ours["bytes_per_task"] < 0.02 * theirs["bytes_per_task"]
