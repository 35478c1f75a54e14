"""Accuracies of earlier tasks are carried over where they cannot have changed, and only there."""

import dataclasses

import pytest

from partialhn.strategies import STRATEGIES
from partialhn.strategies.heads import Heads
from partialhn.training import measured
from partialhn.training.learner import Learner


@pytest.fixture
def learned(cut, with_options, tasks):
    """Four tasks that were learned one after the other."""
    config = with_options(train={"epochs": 1})
    learner = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train)
    list(learner.learn(tasks[:4]))
    return learner


@pytest.fixture
def count(monkeypatch):
    """The tasks that were measured, in order."""
    seen, evaluate = [], measured.evaluate

    def counted(strategy, task, features):
        seen.append(task)
        return evaluate(strategy, task, features)
    monkeypatch.setattr(measured, "evaluate", counted)
    return seen


def row(learned, tasks, monkeypatch, sample=0, finished=None, **options):
    monkeypatch.setattr(measured, "SAMPLE", sample)
    return measured.accuracy_row(learned.strategy, [task.test for task in tasks[:4]],
                                 finished or learned.finished[:3], **options)


def test_only_the_new_task_and_a_sample_are_measured(learned, tasks, count, monkeypatch):
    found, grounds = row(learned, tasks, monkeypatch)
    assert count == [3]
    assert found == learned.finished[3].accuracy_row
    assert list(grounds) == ["3"]
    count.clear()
    row(learned, tasks, monkeypatch, sample=2)
    assert sorted(count) == sorted({3, *count})
    assert len(count) == 3


def test_every_task_is_measured_if_that_is_wished(learned, tasks, count, monkeypatch):
    found, _ = row(learned, tasks, monkeypatch, re_evaluate=True)
    assert sorted(count) == [0, 1, 2, 3]
    assert found == learned.finished[3].accuracy_row


def test_a_record_of_version_0_1_0_gives_no_grounds(learned, tasks, count, monkeypatch):
    old = [dataclasses.replace(record, measured=None) for record in learned.finished[:3]]
    row(learned, tasks, monkeypatch, finished=old)
    assert sorted(count) == [0, 1, 2, 3]


def test_a_sampled_task_that_differs_has_all_measured(learned, tasks, count, monkeypatch):
    wrong = [dataclasses.replace(record, accuracy_row=tuple(-1.0 for _ in record.accuracy_row))
             for record in learned.finished[:3]]
    found, _ = row(learned, tasks, monkeypatch, sample=1, finished=wrong)
    assert sorted(count) == [0, 1, 2, 3]
    assert found == learned.finished[3].accuracy_row


def test_changed_weights_features_and_code_are_measured_again(learned, tasks, count, monkeypatch):
    with monkeypatch.context() as patched:
        own = learned.strategy.tasks[1]
        patched.setitem(own._parameters, "bias_K", own.bias_K + 1)
        row(learned, tasks, monkeypatch)
        assert sorted(count) == [1, 3]
    count.clear()
    other = dataclasses.replace(tasks[2], test=dataclasses.replace(tasks[2].test,
                                                                   joined=("another", "key")))
    row(learned, [*tasks[:2], other, *tasks[3:]], monkeypatch)
    assert sorted(count) == [2, 3]
    count.clear()
    monkeypatch.setattr(measured, "code_version", lambda: "another")
    row(learned, tasks, monkeypatch)
    assert sorted(count) == [0, 1, 2, 3]


def test_a_generator_that_tasks_share_has_every_task_measured(cut, with_options, tasks):
    config = with_options(hypernet={"generator": "bilinear"}, train={"epochs": 1})
    learner = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train)
    list(learner.learn(tasks[:2]))
    assert [record.measured for record in learner.finished] == [{}, {}]


def test_heads_beyond_the_limit_are_generated_again(learned):
    heads = Heads(learned.strategy, [0, 1, 2, 3], kept_bytes=1)
    first = heads[0]
    assert heads[0] is first
    assert heads[1] is not heads[2]
    again = heads[0]
    assert again is not first
    assert (again.bias_K == first.bias_K).all()
    assert [len(part) for part in (heads, heads[1:])] == [4, 3]
