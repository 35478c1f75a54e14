"""The dictionary of directions: what the first tasks' updates share, and tasks that use it."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.networks.columns import packed_bytes
from partialhn.networks.dictionary import OutputSides, principal_directions
from partialhn.strategies import STRATEGIES
from partialhn.training.experience import TaskFeatures
from partialhn.training.forgetting import stays, without_slots
from partialhn.training.learner import Learner

LEARNERS = runpy.run_path(str(Path(__file__).with_name("learners.py")))
measured, weights_hash = LEARNERS["measured"], LEARNERS["weights_hash"]
AFTER, DIRECTIONS = 2, 3
NAMES = ("a", "b", "c", "d", "e")


@pytest.fixture(scope="module")
def options(with_options):
    return with_options(hypernet={"dictionary": DIRECTIONS, "dictionary_after": AFTER})


@pytest.fixture(scope="module")
def learner_of(cut):
    def make(config):
        return Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train)
    return make


@pytest.fixture(scope="module")
def learned(learner_of, options, tasks):
    """Five tasks: the first trains the base, two have columns of their own, two use the others'."""
    learner, answers = learner_of(options), []
    while len(learner.finished) < len(tasks):
        list(learner.learn(tasks[:len(learner.finished) + 1]))
        answers.append([snapshot(learner.strategy, task) for task in range(len(learner.finished))])
    return learner, answers


def snapshot(strategy, task):
    weights = strategy.eval().weights(task)
    return [value.detach().clone() for value in (
        *weights.matrices.values(), weights.norm, weights.classifier_KF, weights.bias_K)]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def update(C, D, *pairs):
    """V diag(x) and A of an update that is the sum of size * row e_i, column e_j."""
    v, A = torch.zeros(C, len(pairs)), torch.zeros(D, len(pairs))
    for index, (i, j, size) in enumerate(pairs):
        v[i, index], A[j, index] = size, 1.0
    return v, A


def test_the_directions_are_those_that_most_updates_share():
    updates = [update(4, 9, (0, 5, 1.0), (1, 2, 0.5)), update(4, 9, (2, 5, 100.0), (3, 7, 10.0)),
               update(4, 9)]
    found = principal_directions(updates, 4)
    assert found.shape == (9, 4)
    assert found.dtype == torch.float32
    # both tasks change input 5; of the others, 2 is a fifth of its task's update and 7 a hundredth
    assert found.abs().argmax(0)[:3].tolist() == [5, 2, 7]
    torch.testing.assert_close(found.T @ found, 9 * torch.diag(torch.tensor([1., 1, 1, 0])),
                               rtol=0, atol=1e-5)


def test_they_are_those_of_the_whole_updates():
    torch.manual_seed(0)
    updates = [(torch.randn(5, w), torch.randn(12, w)) for w in (3, 8)]
    whole = torch.cat([v @ A.T / (v @ A.T).norm() for v, A in updates])
    wanted = torch.linalg.svd(whole.double())[2][:4].T.float()
    found = principal_directions(updates, 4) / 12 ** 0.5
    torch.testing.assert_close(found @ found.T, wanted @ wanted.T, rtol=0, atol=1e-5)


def test_the_first_tasks_have_columns_and_the_later_ones_use_what_they_share(learned):
    strategy = learned[0].strategy
    tensors = strategy.head.matrices
    assert [isinstance(own, OutputSides) for own in strategy.hypernet.columns] == [
        False, False, True, True]
    for tensor, direction_Dd in zip(tensors, strategy.hypernet.dictionary(), strict=True):
        assert direction_Dd.shape == (tensor.row_length, DIRECTIONS)
        assert direction_Dd.dtype == torch.half
    width = strategy.hypernet.width
    own = packed_bytes([(t.rows, t.row_length) for t in tensors], width)
    sides = packed_bytes([(t.rows, 0) for t in tensors], DIRECTIONS)
    codes = 4 * len(tensors) * (width - DIRECTIONS)
    classifier = (2 - 1) * 2 * strategy.head.width - 2 * 2  # a byte less a number, a scale a class
    assert strategy.task_bytes(2) - strategy.task_bytes(3) == own - sides + codes + classifier
    state = strategy.state_dict()
    assert sum(value.nbytes for name, value in state.items()
               if name.startswith("hypernet.columns.3.")) == sides
    assert strategy.hypernet.generating_macs(3) == DIRECTIONS * strategy.head.weight_count


def test_a_task_that_uses_the_dictionary_changes_every_tensor_within_its_directions(learned):
    generator, strategy = learned[0].strategy.hypernet, learned[0].strategy
    for base, direction_Dd, rows in zip(generator.base, generator.dictionary(),
                                        strategy.eval().weights(4).matrices.values(),
                                        strict=True):
        changed_CD = (rows.reshape(base.shape) - base).detach()
        assert changed_CD.norm() > 1e-3 * base.norm()
        basis_Dd = torch.linalg.qr(direction_Dd.float())[0]
        outside_CD = changed_CD - changed_CD @ basis_Dd @ basis_Dd.T
        assert outside_CD.norm() < 1e-4 * changed_CD.norm()


def test_nothing_is_forgotten_to_the_bit(learned):
    learner, answers = learned
    for count, before in enumerate(answers, 1):
        assert len(before) == count
        for task, weights in enumerate(before):
            assert same(weights, snapshot(learner.strategy, task))


def test_before_its_first_step_a_task_answers_with_the_weights_that_it_starts_from(learned,
                                                                                   learner_of,
                                                                                   options):
    learner, other = learned[0], learner_of(options)
    tensors, fields = learner.state()
    other.restore(tensors, fields)
    other.strategy.add_task(2)
    other.strategy.begin(5)
    matrices = other.strategy.weights(5).matrices.values()
    assert all(torch.equal(rows.reshape(base.shape), base)
               for rows, base in zip(matrices, other.strategy.hypernet.base, strict=True))


def test_a_stream_that_stops_in_a_later_task_goes_on_to_the_same_bits(learned, learner_of, options,
                                                                      tasks):
    first = learner_of(options)
    list(first.learn(tasks[:3]))
    records = first.fit_next(tasks[:4])
    next(records)
    again = learner_of(options)
    again.restore(*first.state())
    list(again.learn(tasks))
    assert weights_hash(again) == weights_hash(learned[0])
    assert measured(again) == measured(learned[0])


def test_tasks_after_the_dictionary_are_learned_apart_from_each_other(learned, learner_of, options,
                                                                      tasks):
    whole = learned[0]
    needed = [whole.strategy.needs(task, None, known=0) for task in range(1, 5)]
    assert needed == [0, 1, 2, 2]  # one more than the closed dictionary would need is harmless
    model = learner_of(options)
    list(model.learn(tasks[:3]))
    before = model.state()
    for index in (4, 3):
        worker = learner_of(options)
        worker.restore(*before)
        worker.skip_to(tasks, index)
        list(worker.fit_next(tasks[:index + 1]))
        assert same(snapshot(worker.strategy, index), snapshot(whole.strategy, index))
        kept = worker.strategy.task_state(index)
        assert not [name for name in kept if "dictionary" in name]
        if index == 3:
            model.load_task_state(tasks, kept, [], 0.0)
            assert same(snapshot(model.strategy, 3), snapshot(whole.strategy, 3))


def test_after_forgetting_a_task_is_learned_from_the_last_model_which_has_the_dictionary(
        cut, with_options, learner_of, tasks):
    """Of a task that trains the base, three openers and one after them, two are left; so the next
    is the third, and would come before the dictionary is closed if nothing were known.
    """
    config = with_options(hypernet={"dictionary": DIRECTIONS, "dictionary_after": 3},
                          train={"epochs": 1})
    whole = learner_of(config)
    list(whole.learn(tasks))
    model = Model(config, cut.trunk, whole.strategy,
                  tuple(TaskInfo(name, ("x", "y")) for name in NAMES))
    left = without_slots(model, [1, 2, 3], None).strategy
    assert left.hypernet.dictionary is not None
    assert [left.needs(2, None, known) for known in (0, 2)] == [0, 1]


def test_a_classifier_of_8_bits_answers_as_the_one_that_was_learned(learner_of, learned, options,
                                                                    tasks):
    learner = learner_of(options)
    learner.restore(*learned[0].state())
    strategy = learner.strategy
    strategy.add_task(2)
    strategy.begin(5)
    before_KF = strategy.weights(5).classifier_KF.detach().clone()
    strategy.finish(5)
    own = strategy.tasks[5]
    assert own.classifier_KF.dtype == torch.int8
    half_step_K = before_KF.abs().amax(1) / 127 / 2
    off_KF = (strategy.weights(5).classifier_KF - before_KF).abs()
    assert (off_KF <= 1.1 * half_step_K[:, None]).all()
    strategy.add_task(2, refreshes=5)
    assert torch.equal(strategy.tasks[6].classifier_KF, strategy.weights(5).classifier_KF)


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_the_dictionary_outlives_a_forgotten_task(learned, cut, options, learner_of, tasks, gone,
                                                  tmp_path):
    strategy = learned[0].strategy
    model = Model(options, cut.trunk, strategy,
                  tuple(TaskInfo(name, ("x", "y")) for name in NAMES))
    without_slots(model, [gone], None).save(tmp_path / "model")
    after = Model.load(tmp_path / "model").strategy
    kept = [task for task in range(5) if task != gone]
    for new, old in enumerate(kept):
        assert same(snapshot(after, new), snapshot(strategy, old))
    assert any("dictionary" in part for part in stays(model, [gone])) == (gone == 1)
    fields = {"classes": [2] * 4, "epochs": [], "finished": [
        dataclasses.asdict(record) for record in learned[0].finished[:4]]}
    again = learner_of(options)
    again.restore({f"strategy.{name}": value for name, value in after.state_dict().items()}, fields)
    again.strategy.add_task(2)
    assert again.strategy.hypernet.uses_dictionary(4)


def test_where_no_task_was_trained_there_are_no_directions(learner_of, with_options, tasks):
    config = with_options(hypernet={"dictionary": DIRECTIONS, "dictionary_after": AFTER},
                          train={"epochs": None})  # few images: every task is ridge regression
    learner = learner_of(config)
    list(learner.learn(tasks[:4]))
    assert learner.strategy.hypernet.dictionary is None
    assert not learner.strategy.hypernet.uses_dictionary(3)
    [note] = learner.strategy.notes
    assert "there is no dictionary (--dictionary 3)" in note


def test_notes_say_nothing_of_a_dictionary_that_is_made_or_still_to_be_made(learned, learner_of,
                                                                           options, tasks):
    assert learned[0].strategy.notes == ()
    first = learner_of(options)
    list(first.learn(tasks[:1]))
    assert first.strategy.notes == ()


def test_the_answers_of_a_task_are_named_by_the_dictionary_too(learned):
    strategy = learned[0].strategy
    names = [strategy.answers_by(task) for task in range(5)]
    assert len(set(names)) == 5
    direction_Dd = strategy.hypernet.dictionary()[0]
    kept = direction_Dd.clone()
    direction_Dd.mul_(2)
    changed = [strategy.answers_by(task) for task in range(5)]
    direction_Dd.copy_(kept)
    assert [one == other for one, other in zip(names, changed, strict=True)] == [
        True, True, True, False, False]


def test_another_order_of_the_first_tasks_gives_other_directions(learned, learner_of, options,
                                                                 tasks):
    learner = learner_of(options)
    swapped: list[TaskFeatures] = [tasks[0], tasks[3], tasks[1]]
    list(learner.learn(swapped))
    assert not same(learner.strategy.hypernet.dictionary(),
                    learned[0].strategy.hypernet.dictionary())
