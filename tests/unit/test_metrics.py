"""Every expected value is a sum worked by hand, written out beside it."""

import math

import numpy as np
import pytest

from partialhn.errors import InputError
from partialhn.evaluation import metrics

NAN = math.nan
# Task 0: learned at 0.9, best 0.95 after task 1, ends at 0.8. Task 1: 0.7, ends at 0.75.
THREE_TT = [
    [0.90, NAN, NAN],
    [0.95, 0.70, NAN],
    [0.80, 0.75, 0.60],
]


def test_accuracy_is_the_mean_of_the_last_row():
    assert metrics.accuracy(THREE_TT) == pytest.approx((0.80 + 0.75 + 0.60) / 3)


def test_learning_accuracy_is_the_mean_of_the_diagonal():
    assert metrics.learning_accuracy(THREE_TT) == pytest.approx((0.90 + 0.70 + 0.60) / 3)


def test_forgetting_counts_from_the_best_moment_not_the_first():
    assert metrics.forgetting(THREE_TT) == pytest.approx(((0.95 - 0.80) + (0.75 - 0.75)) / 2)
    assert metrics.forgetting_by_task(THREE_TT) == pytest.approx([0.15, 0.0, 0.0])


def test_backward_transfer_counts_from_the_moment_of_learning():
    assert metrics.backward_transfer(THREE_TT) == pytest.approx(
        ((0.80 - 0.90) + (0.75 - 0.70)) / 2)


def test_forward_transfer_compares_with_an_untrained_model():
    table_TT = np.array(THREE_TT)
    table_TT[0, 1], table_TT[1, 2] = 0.30, 0.45
    assert metrics.forward_transfer(table_TT, [0.1, 0.25, 0.2]) == pytest.approx(
        ((0.30 - 0.25) + (0.45 - 0.20)) / 2)


def test_accuracy_before_training_cannot_be_forgotten():
    table_TT = np.array(THREE_TT)
    table_TT[0, 1] = 0.99
    assert metrics.forgetting_by_task(table_TT) == pytest.approx([0.15, 0.0, 0.0])


def test_summary_holds_every_metric():
    summary = metrics.summarise(THREE_TT)
    assert summary.accuracy == pytest.approx(2.15 / 3)
    assert summary.learning_accuracy == pytest.approx(2.20 / 3)
    assert summary.forgetting == pytest.approx(0.075)
    assert summary.backward_transfer == pytest.approx(-0.025)
    assert summary.forgetting_per_task == pytest.approx((0.15, 0.0, 0.0))


def test_only_the_counted_columns_are_tasks_but_every_row_is_a_moment():
    table_TT = [[0.9, NAN, NAN, NAN], [0.8, 0.5, NAN, NAN], [0.8, 0.7, 0.6, NAN],
                [0.2, 0.6, 0.5, 0.4]]
    summary = metrics.summarise(table_TT, [1, 3])  # the best of column 1 is in a row between
    assert summary.accuracy == pytest.approx(0.5)
    assert summary.learning_accuracy == pytest.approx(0.45)
    assert summary.forgetting == pytest.approx(0.1)
    assert summary.backward_transfer == pytest.approx(0.1)
    assert summary.forgetting_per_task == pytest.approx((0.1, 0.0))


def test_one_task_forgets_nothing():
    summary = metrics.summarise([[0.5]])
    assert (summary.accuracy, summary.learning_accuracy) == (0.5, 0.5)
    assert (summary.forgetting, summary.backward_transfer) == (0, 0)
    assert summary.forgetting_per_task == (0.0,)


def test_none_stands_for_not_measured_as_in_json():
    assert metrics.summarise([[0.5, None], [0.4, 0.6]]) == metrics.summarise(
        [[0.5, NAN], [0.4, 0.6]])


def test_the_table_given_is_left_alone():
    table_TT = np.array(THREE_TT, dtype=np.float32)
    before_TT = table_TT.copy()
    metrics.summarise(table_TT)
    np.testing.assert_array_equal(table_TT, before_TT)


@pytest.mark.parametrize(("table", "message"), [
    ([], r"shape \(0,\); allowed: T x T"),
    (np.empty((0, 0)), r"shape \(0, 0\)"),
    ([0.5, 0.5], r"shape \(2,\)"),
    ([[0.5, 0.5]], r"shape \(1, 2\)"),
    (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\)"),
    ([[0.5], [0.5, 0.5]], "cannot be read as a table of numbers"),
    ([["high"]], "cannot be read as a table of numbers"),
    ([[0.5, NAN], [0.5, 98.2]], r"accuracy_TT\[1, 1\] is 98.2; allowed: 0 to 1"),
    ([[-0.1]], r"accuracy_TT\[0, 0\] is -0.1"),
    ([[math.inf]], r"accuracy_TT\[0, 0\] is inf"),
    ([[0.5, NAN], [NAN, 0.5]], r"accuracy_TT\[1, 0\] is not measured"),
    ([[NAN]], r"accuracy_TT\[0, 0\] is not measured"),
])
def test_a_wrong_table_is_refused(table, message):
    with pytest.raises(InputError, match=message):
        metrics.summarise(table)


@pytest.mark.parametrize(("table", "untrained", "message"), [
    (THREE_TT, [0.1, 0.1, 0.1], r"accuracy_TT\[0, 1\] is not measured"),
    (THREE_TT, [0.1, 0.1], r"untrained_T has shape \(2,\)"),
    ([[0.5]], [0.1], "1 task is undefined"),
])
def test_forward_transfer_refuses_what_it_cannot_compute(table, untrained, message):
    with pytest.raises(InputError, match=message):
        metrics.forward_transfer(table, untrained)
