"""How sure an accuracy is, against numbers worked by hand and against draws."""

import math

import numpy as np
import pytest
from scipy import stats

from partialhn.evaluation.certainty import Estimate, difference, mean_accuracy, share_interval
from pipelines.report.sure import missing, told

Z = 1.959964


def test_the_interval_of_a_share_is_wilsons():
    # 5 of 10: centre 0.5, half Z * sqrt(0.25 / 10 + Z^2 / 400) / (1 + Z^2 / 10)
    half = Z * math.sqrt(0.025 + Z**2 / 400) / (1 + Z**2 / 10)
    assert share_interval(0.5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert share_interval(1.0, 10)[1] == pytest.approx(1.0)
    assert share_interval(1.0, 10)[0] == pytest.approx(10 / (10 + Z**2), abs=1e-6)


def test_a_mean_over_tasks_counts_the_images_of_each():
    # (30 + 2) / 44 and (60 + 2) / 104
    one, two = 32 / 44, 62 / 104
    variance = (one * (1 - one) / 44 + two * (1 - two) / 104) / 4
    found = mean_accuracy([[0.75, 0.6]], [40, 100])
    assert found.mean == pytest.approx(0.675)
    assert found.images == 140
    assert found.half == pytest.approx(Z * math.sqrt(variance), rel=1e-5)


def test_seeds_add_their_own_doubt():
    alone = mean_accuracy([[0.7]], [100])
    found = mean_accuracy([[0.65], [0.75]], [100])
    seeds = 12.7062 * math.sqrt(0.005 / 2)
    assert found.half == pytest.approx(math.sqrt(alone.half**2 + seeds**2), rel=1e-4)


def test_the_intervals_hold_the_truth_in_95_of_100_draws():
    draw, held = np.random.default_rng(0), 0
    for _ in range(500):
        shares = [draw.binomial(n, p) / n for n, p in ((40, 0.6), (60, 0.9))]
        found = mean_accuracy([shares], [40, 60])
        held += found.low <= 0.75 <= found.high
    assert 0.92 <= held / 500 <= 0.98


def test_answers_to_the_same_images_tell_more_than_two_accuracies():
    """9 images of 100 are right by one alone, 1 by the other alone."""
    ours, theirs = np.zeros(100, bool), np.zeros(100, bool)
    ours[:70] = True
    theirs[9:71] = True
    plain = difference([[0.70]], [[0.62]], [100])
    paired = difference([[0.70]], [[0.62]], [100], [[ours]], [[theirs]])
    assert paired.mean == plain.mean == pytest.approx(0.08)
    # squares: 10 images and the two that are added; their mean is 8 / 102
    variance = (12 / 102 - (8 / 102)**2) / 102
    assert paired.half == pytest.approx(Z * math.sqrt(variance), rel=1e-5)
    assert paired.tells
    assert not plain.tells


def test_equal_answers_to_few_images_prove_nothing():
    right = np.ones(5, bool)
    found = difference([[1.0]], [[1.0]], [5], [[right]], [[right]])
    assert found.half > 0.1
    assert missing(found, "images") == "no difference was measured"


def test_the_images_that_are_missing_are_as_many_as_it_takes():
    found = Estimate(0.02, (0.02,), 0.02**2, 400)
    more = found.more_images()
    assert more is not None
    for added, tells in ((more, True), (more - 1, False)):
        share = 400 / (400 + added)
        assert Estimate(0.02, (0.02,), 0.02**2 * share, 400 + added).tells is tells
    assert missing(found, "images") == f"too few to tell: {more:,} more images would"
    assert found.more_seeds() is None, "one seed does not show how much they differ"


def test_the_seeds_that_are_missing_are_as_many_as_it_takes():
    found = Estimate(0.02, (0.0, 0.04), 1e-8, 10**6)
    more = found.more_seeds()
    # the standard deviation stays 0.0283: 11 seeds have t = 2.228, 10 have 2.262
    assert more == 11 - 2
    assert "9 more seeds would" in missing(found, "images")
    assert found.more_images() is None


def test_both_are_missing_where_each_alone_leaves_a_doubt():
    found = Estimate(0.02, (0.0, 0.04), 0.02**2, 100)
    images, seeds = found.more_of_both()
    for added, tells in ((seeds, True), (seeds - 1, False)):
        count = 2 + added
        spread = 0.02 * 2**0.5
        quantile = stats.t.ppf(0.975, count - 1)
        half = math.sqrt(Z**2 * 0.02**2 * 2 / count + quantile**2 * spread**2 / count)
        assert (half < 0.02) is tells
    assert images == 100 * (2 + seeds) // 2 - 100
    assert missing(found, "images") == (
        f"too few to tell: {images} more images together with {seeds} more seeds would")
    assert missing(Estimate(0.5, (0.5,), 1e-6, 10), "images") == ""


def test_a_loss_is_told_with_an_interval_of_the_same_sign():
    found = Estimate(-0.03, (-0.03,), 0.01**2, 900)
    assert told(found, "images") == "3.0 points (95 % interval 1.0 to 5.0)"
    assert found.tells
