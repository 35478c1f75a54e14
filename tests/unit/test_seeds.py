"""Means, intervals and paired differences, by sums worked by hand."""

import pytest

from partialhn.benchmarks.comparison import rows
from partialhn.errors import InputError
from partialhn.evaluation.intervals import Interval, paired


def test_three_seeds_by_hand():
    """Mean 0.6, deviation 0.1, standard error 0.1 / sqrt 3, t of two degrees 4.30265."""
    found = Interval.of([0.5, 0.6, 0.7])
    assert found.mean == pytest.approx(0.6)
    assert found.high - found.mean == pytest.approx(4.30265 * 0.1 / 3**0.5, rel=1e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert Interval.of([0.5]).low is None
    assert not Interval.of([0.5]).excludes_zero


def test_a_paired_difference_leaves_out_what_the_seed_gives_both():
    """Differences 0.01, 0.02, 0.03 among accuracies that are 0.2 apart: sure of a small gain."""
    ours = {0: 0.41, 1: 0.62, 2: 0.83}
    theirs = {2: 0.80, 0: 0.40, 1: 0.60}
    found = paired(ours, theirs)
    assert found.values == pytest.approx((0.01, 0.02, 0.03))
    assert found.mean == pytest.approx(0.02)
    assert found.mean - found.low == pytest.approx(4.30265 * 0.01 / 3**0.5, rel=1e-5)
    assert not found.excludes_zero
    assert paired(ours, {seed: value - 0.1 for seed, value in ours.items()}).excludes_zero


@pytest.mark.parametrize("theirs", [{0: 0.1}, {0: 0.1, 2: 0.1}, {}])
def test_other_seeds_are_not_compared(theirs):
    with pytest.raises(InputError, match=r"seeds are \[0, 1\] and .*; allowed: the same seeds"):
        paired({0: 0.5, 1: 0.5}, theirs)


def cell(label, strategy, seed, acc, depth=3):
    return {"label": label, "strategy": strategy, "depth": depth, "seed": seed, "acc": acc,
            "learning_accuracy": acc + 0.1, "forgetting": 0.1, "bytes_per_task": 100 + seed,
            "cpu_seconds": 2.0 + seed, "feature_bytes": 7}


def test_rows_of_a_pack():
    cells = [cell("partial_hn", "partial_hn", 0, 0.5), cell("partial_hn", "partial_hn", 1, 0.7),
             cell("naive", "naive", 0, 0.4), cell("naive", "naive", 1, 0.4),
             cell("er", "latent_replay", 0, 0.9, depth=0)]
    found = rows(cells, {"naive@3": (0.3, 0.5), "partial_hn@3": (0.7, 0.8)})
    assert [row.key for row in found] == ["er@0", "partial_hn@3", "naive@3"]
    er, ours, naive = found
    assert (er.ahead, er.as_expected) == (None, None)  # no hypernetwork at its depth
    assert (ours.acc.mean, ours.ahead, ours.as_expected) == (pytest.approx(0.6), None, False)
    assert naive.ahead.values == pytest.approx((0.1, 0.3))
    assert (naive.bytes_per_task, naive.cpu_seconds, naive.as_expected) == (100.5, 2.5, True)
