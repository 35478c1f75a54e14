"""Tasks with few images: solved in closed form, kept, sent, loaded, and warped pictures of them."""

import dataclasses
import inspect
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import DataConfig, TrainConfig
from partialhn.data.augment import draw, vary
from partialhn.data.splits import held_out as held_out_share
from partialhn.detector.detector import Detector
from partialhn.detector.statistics import SAMPLE, spread_over
from partialhn.features.closed_form import accuracy, fit_ridge, sharpness
from partialhn.features.feature_set import FeatureSet
from partialhn.predict import Predictor
from partialhn.run import cut_network
from partialhn.strategies import STRATEGIES
from partialhn.strategies.partial_hn import HypernetTask, PartialHypernet
from partialhn.training import choice, experience
from partialhn.training.answers import answer, embedded
from partialhn.training.budget import held_out_loss
from partialhn.training.learner import Learner

LEARNERS = runpy.run_path(str(Path(__file__).with_name("learners.py")))
measured, weights_hash = LEARNERS["measured"], LEARNERS["weights_hash"]


@pytest.fixture
def learner(cut, with_options):
    """A learner of tasks with 20 images a class, 4 more held out, and budgets that fit them."""
    def new(name="partial_hn", **options):
        config = with_options(train={"strategy": name, "epochs": None, "min_steps": 4, **options})
        return Learner(STRATEGIES[name](cut.head, cut.start, config), config.train)
    return new


def test_with_few_images_a_task_is_ridge_regression_on_all_of_them(learner, tasks):
    learned = learner()
    list(learned.learn(tasks[:2]))
    assert [(record.epoch, record.solved) for record in learned.epochs] == [(1, True)] * 2
    task = tasks[1]
    solved = choice.solve(learned.strategy, [task.train, task.validation], 2)
    logits_NK, y_N = answer(learned.strategy, 1, task.test)
    wanted_NK = solved.classifier.logits(choice.seen(learned.strategy, [task.test], solved.side))
    torch.testing.assert_close(logits_NK, wanted_NK.float(), atol=0.02, rtol=0.02)  # float16
    assert learned.epochs[1].ridge_accuracy == solved.left_out_accuracy
    assert learned.finished[1].accuracy_row[1] == accuracy(logits_NK, y_N) > 0.8


@pytest.mark.parametrize("strategy", ["partial_hn", "ridge", "ncm"])
def test_what_is_solved_in_closed_form_makes_no_passes(learner, tasks, strategy):
    learned = learner(strategy)
    list(learned.learn(tasks[:1]))
    assert [record.passes for record in learned.epochs] == [0]


def test_the_detector_sees_no_answer_about_an_image_that_the_head_has_learned(learner, tasks):
    """Held-out images of a task that is solved from all of them are answered by the solution of all
    others; what the head itself gives for them would make every new image strange.
    """
    learned = learner()
    learned.inference = Detector(60)
    list(learned.learn(tasks[:1]))
    task, slot = tasks[0], learned.inference.slots[0]
    solved = choice.solve(learned.strategy, [task.train, task.validation], 2)
    left_out_NK = solved.classifier.left_out_NK[len(task.train):].float()
    rows_S = spread_over(len(task.validation), SAMPLE)
    torch.testing.assert_close(slot["sample_head_SK"], slot["sharpness"] * left_out_NK[rows_S])
    own_NK, y_N = answer(learned.strategy, 0, task.validation)
    loss = torch.nn.functional.cross_entropy
    assert loss(own_NK, y_N) < loss(left_out_NK, y_N)
    trained = learner(closed_form="never")
    trained.inference = Detector(60)
    list(trained.learn(tasks[:1]))
    own_NK, slot = answer(trained.strategy, 0, task.validation)[0], trained.inference.slots[0]
    torch.testing.assert_close(slot["sample_head_SK"], slot["sharpness"] * own_NK[rows_S],
                               atol=0.02, rtol=0.02)  # float16


@pytest.mark.parametrize(("options", "name"), [
    ({"closed_form": "never"}, "partial_hn"), ({"epochs": 2}, "partial_hn"),
    ({}, "separate_heads")])
def test_who_trains_all_the_same(learner, tasks, options, name):
    learned = learner(name, **options)
    list(learned.fit_next(tasks))
    assert len(learned.epochs) > 1
    assert not any(record.solved for record in learned.epochs)
    assert learned.epochs[-1].ridge_accuracy is None


@pytest.mark.parametrize(("rate", "ridge_wins"), [(1e-9, True), (5e-3, False)])
def test_a_trained_head_is_replaced_only_where_ridge_has_a_smaller_held_out_loss(
        learner, tasks, monkeypatch, rate, ridge_wins):
    """A rate of nothing learns nothing, and ridge regression on the head's features is left out
    there. The other rate learns the digits, and ridge is made to know none.
    """
    monkeypatch.setattr(choice, "FEW", 1)
    monkeypatch.setattr(choice, "ENOUGH_TO_CHOOSE", 4)
    task = tasks[0]
    if ridge_wins:
        monkeypatch.setattr(experience, "average_with_ridge", lambda *_: None)
    else:
        monkeypatch.setattr(experience, "solve", lambda strategy, sets, classes: choice.solve(
            strategy, [dataclasses.replace(each, y_N=1 - each.y_N) for each in sets], classes))
    learned = learner(learning_rate=rate, min_steps=60)
    list(learned.fit_next([task]))
    last = learned.epochs[-1]
    assert (last.solved, last.ridge_accuracy > 0.5) == (ridge_wins, ridge_wins)
    assert (learned.strategy.tasks[0].linear_KF is not None) == ridge_wins
    assert last.validation_accuracy > 0.5
    assert not ridge_wins or last.validation_accuracy == last.ridge_accuracy
    again = learner(learning_rate=rate, min_steps=60)
    running = again.learn([task])
    for _ in learned.epochs:  # stopped after the choice and before the task's record
        next(running)
    restored = learner(learning_rate=rate, min_steps=60)
    restored.restore(*again.state())
    list(restored.fit_next([task]))
    assert len(restored.epochs) == len(learned.epochs)
    assert weights_hash(restored) == weights_hash(learned)


def test_a_trained_classifier_is_averaged_with_ridge_regression_on_the_features_of_its_head(
        learner, tasks, monkeypatch):
    """The head stays as it is; the new classifier lies between the two, as near to one as to the
    other in units of what fits the held-out images best.
    """
    monkeypatch.setattr(choice, "FEW", 1)
    monkeypatch.setattr(choice, "ENOUGH_TO_CHOOSE", 4)
    monkeypatch.setattr(experience, "_ridge_logits", lambda strategy, task, held_out: (
        torch.zeros(len(held_out), 2)))  # it guesses
    task, learned = tasks[0], {}
    for closed_form in ("never", "auto"):
        learned[closed_form] = learner(closed_form=closed_form)
        list(learned[closed_form].fit_next([task]))
    plain, both = (learned[name].strategy.tasks[0] for name in ("never", "auto"))
    head = learned["never"].strategy
    for name, matrix in head.weights(0).matrices.items():
        assert torch.equal(matrix, learned["auto"].strategy.weights(0).matrices[name])
    x_NF, y_N = embedded(head, 0, task.train)
    solved = fit_ridge(x_NF, y_N, 2)
    solved_KF = torch.cat([solved.weight_KF, solved.bias_K[:, None]], 1)
    trained_KF, both_KF = (
        torch.cat([own.classifier_KF, own.bias_K[:, None]], 1).detach().double()
        for own in (plain, both))
    factors, residual, _, _ = np.linalg.lstsq(
        torch.stack([trained_KF.flatten(), solved_KF.flatten()], 1), both_KF.flatten())
    assert (factors > 0).all()
    assert residual[0] < 1e-3 * float((both_KF**2).sum())
    x_NF, y_N = embedded(head, 0, task.validation)
    shares = [sharpness(x_NF.double() @ each_KF[:, :-1].T + each_KF[:, -1], y_N) * float(factor)
              for each_KF, factor in zip((trained_KF, solved_KF), 1 / factors, strict=True)]
    assert shares[0] == pytest.approx(shares[1], rel=0.05)  # each counts as much as the other


def test_a_solved_task_is_stored_loaded_and_given_to_another_worker(learner, tasks, cut, tmp_path,
                                                                   images, with_options):
    one, other = learner(), learner()
    list(one.learn(tasks[:1]))
    first = {key: value.clone() for key, value in one.strategy.task_state(0).items()}
    other.load_task_state(tasks[:1], first, one.epochs[:1], 0.0)
    list(one.learn(tasks[:2]))
    state = {key: value.clone() for key, value in one.strategy.task_state(1).items()}
    other.load_task_state(tasks[:2], state, one.epochs[1:], 0.0)
    assert weights_hash(other) == weights_hash(one)
    config = with_options(train={"epochs": None})
    infos = tuple(TaskInfo(task.name, ("a", "b")) for task in tasks[:2])
    Model(config, cut.trunk, one.strategy, infos).save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    z_BCHW = cut.trunk(images[:8])
    with torch.no_grad():
        assert torch.equal(loaded.strategy(z_BCHW, 1), one.strategy(z_BCHW, 1))
    answers = Predictor(loaded).answers(z_BCHW, ["1"] * 8)
    assert all(0.5 <= each.probability <= 1 for each in answers)


def test_a_solved_task_can_be_refreshed(learner, tasks):
    stream = [*tasks[:2], dataclasses.replace(tasks[1], name=f"{tasks[1].name}/2", refreshes=1)]
    learned = learner()
    list(learned.learn(stream))
    assert len(learned.finished) == 3


def test_cells_are_tried_where_they_are_few_or_the_images_are(tasks):
    features = tasks[0].train  # 80 channels of 4 x 4
    assert choice._sides(features, 40) == [1, 2, 3, 4]
    assert choice._sides(features, 5000) == [1, 2]


@pytest.fixture
def from_network(cut, with_options):
    """A learner whose tasks start from the network's own weights, and its configuration."""
    def new(**options):
        config = with_options(hypernet={"starts_from": "network"}, train={
            "epochs": None, "min_steps": 4, **options})
        return Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train), config
    return new


def has_network_head(strategy, task):
    weights = strategy.weights(task)
    return len(weights.norm) > 0 and torch.allclose(
        weights.norm, strategy.reference_norm, atol=2e-3) and all(  # float16
        torch.equal(value.reshape(base.shape), base) for value, base
        in zip(weights.matrices.values(), strategy.hypernet.base, strict=True))


def test_from_the_network_few_images_are_seen_by_its_own_head_too(from_network, tasks, monkeypatch):
    strategy, task = from_network()[0].strategy, tasks[0]
    sides = [None, *choice._sides(task.train, len(task.train))]
    losses = []
    for side in sides:
        x_NF = choice.seen(strategy, [task.train], side)
        width = strategy.head.width
        importance_F = None if side else torch.where(torch.arange(x_NF.shape[1]) < width, 1.0, (
            width / (x_NF.shape[1] - width))**0.5)
        left_out_NK = fit_ridge(x_NF, task.train.y_N, 2, importance_F).left_out_NK
        losses.append(held_out_loss(left_out_NK, task.train.y_N))
    monkeypatch.setattr(choice, "CLEARLY", 0.0)
    assert choice.solve(strategy, [task.train], 2).side == sides[losses.index(min(losses))]
    monkeypatch.setattr(choice, "FEW_FOR_NETWORK", 1)
    assert choice.solve(strategy, [task.train], 2).side == sides[1 + losses[1:].index(
        min(losses[1:]))]


def test_a_task_with_the_networks_head_is_learned_refreshed_stored_and_loaded(
        from_network, cut, tasks, images, monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "_sides", lambda *_: [])
    learned, config = from_network()
    again = dataclasses.replace(tasks[1], name="1/2", refreshes=1)
    list(learned.learn([*tasks[:2], again]))
    strategy, task = learned.strategy, tasks[1]
    assert [record.solved for record in learned.epochs] == [True] * 3
    solved = choice.solve(strategy, [task.train, task.validation], 2)
    for slot in (1, 2):
        assert has_network_head(strategy, slot)
        logits_NK, _ = answer(strategy, slot, task.test)
        wanted_NK = solved.classifier.logits(choice.seen(strategy, [task.test], None,
                                                         solved.blocks))
        torch.testing.assert_close(logits_NK, wanted_NK.float(), atol=0.02, rtol=0.02)  # float16
    infos = tuple(TaskInfo(name, ("a", "b")) for name in ("0", "1", "1/2"))
    Model(config, cut.trunk, strategy, infos).save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    z_BCHW = cut.trunk(images[:8])
    with torch.no_grad():
        assert all(torch.equal(loaded.strategy(z_BCHW, slot), strategy(z_BCHW, slot))
                   for slot in range(3))


def bytes_of(strategy):
    return sum(value.nbytes for value in strategy.state_dict().values())


@pytest.mark.parametrize("dictionary", [0, 8])
def test_a_solved_task_holds_what_its_answers_use_and_nothing_else(cut, with_options, tasks,
                                                                    dictionary):
    config = with_options(hypernet={"dictionary": dictionary, "dictionary_after": 1}, train={
        "epochs": None, "min_steps": 4})
    learned = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train)
    list(learned.learn(tasks[:2]))
    strategy, before = learned.strategy, bytes_of(learned.strategy)
    list(learned.learn(tasks[:3]))
    own = strategy.tasks[2]
    assert own.linear_KF.nbytes + own.linear_K.nbytes == strategy.task_bytes(2)
    assert bytes_of(strategy) - before == strategy.task_bytes(2) + own.start.nbytes


def test_tasks_with_the_networks_head_share_its_vectors(from_network, tasks, monkeypatch):
    monkeypatch.setattr(choice, "_sides", lambda *_: [])
    strategy = (learned := from_network()[0]).strategy
    none = bytes_of(strategy)
    list(learned.learn(tasks[:1]))
    one = bytes_of(strategy)
    list(learned.learn(tasks[:2]))
    own = strategy.tasks[1]
    used = own.classifier_KF.nbytes + own.bias_K.nbytes + own.earlier_KE.nbytes
    assert strategy.task_bytes(1) == used
    assert bytes_of(strategy) - one == used + own.start.nbytes + own.earlier_blocks.nbytes
    assert one - none == bytes_of(strategy) - one + 2 * strategy.head.norm_length
    assert has_network_head(strategy, 0)


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["as stored now", "as stored before"])
@pytest.mark.parametrize("waits", [False, True])
def test_solved_tasks_of_every_form_are_read(learner, from_network, tasks, monkeypatch, own_head,
                                             whole, waits):
    if own_head:
        monkeypatch.setattr(choice, "_sides", lambda *_: [])
    if whole:
        monkeypatch.setattr(HypernetTask, "drop_unused", lambda _: None)
    make = (lambda: from_network()[0]) if own_head else learner
    learned, other = make(), make()
    list(learned.learn(tasks[:2]))
    state = {name: value.clone() for name, value in learned.strategy.state_dict().items()}
    assert len(state["tasks.1.norm"]) == (learned.strategy.head.norm_length if whole else 0)
    monkeypatch.undo()
    if not waits:
        monkeypatch.setattr(PartialHypernet, "take_stored", lambda _, classes, state: state)
    other.strategy.load_tasks([2, 2], state)
    assert other.strategy.tasks.waits(1) == waits
    for task in range(2):
        assert torch.equal(*(answer(each.strategy, task, tasks[task].test)[0]
                             for each in (learned, other)))
        assert other.strategy.answers_by(task) == learned.strategy.answers_by(task)
    found = other.strategy.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_solved_tasks_without_generated_weights_are_read(network, with_options, tmp_path):
    config = with_options(backbone={"freeze_depth": 4}, train={"epochs": None, "min_steps": 4})
    cut = cut_network(config, network)
    learned = Learner(cut.strategy(config), config.train)
    z_BCHW = cut.trunk(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    learned.strategy.add_task(2)
    learned.strategy.begin(0)
    x_NF = torch.randn(8, z_BCHW.shape[1], dtype=torch.float64)
    learned.strategy.take_linear(0, fit_ridge(x_NF, torch.arange(8) % 2, 2))
    learned.strategy.finish(0)
    infos = (TaskInfo("0", ("a", "b")),)
    Model(config, cut.trunk, learned.strategy, infos).save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded.strategy(z_BCHW, 0), learned.strategy(z_BCHW, 0))
    assert learned.strategy.task_bytes(0) == 2 * (2 * z_BCHW.shape[1] + 2)


def test_a_task_whose_trained_head_was_given_up_has_no_columns(learner, tasks):
    learned = learner(closed_form="never")
    list(learned.learn(tasks[:2]))
    strategy, task = learned.strategy, tasks[1]
    before = strategy.task_bytes(1)
    strategy.add_task(2)
    strategy.begin(2)
    with torch.no_grad():
        for A_Dd in strategy.hypernet.of_task(2).A:
            A_Dd.fill_(1.0)
    choice.take(strategy, 2, choice.solve(strategy, [task.train], 2))
    strategy.finish(2)
    strategy.conclude(2)
    assert strategy.task_bytes(1) == before
    assert strategy.task_bytes(2) == strategy.tasks[2].linear_KF.nbytes + 2 * 2


def test_cells_are_preferred_to_the_networks_head_only_where_they_are_clearly_better(
        from_network, tasks, monkeypatch):
    """Among five choices that few images judge, one often looks best by luck."""
    strategy, task = from_network()[0].strategy, tasks[0]
    right_NF = torch.nn.functional.one_hot(task.train.y_N, 2).double()
    noise_NF, other_NF = torch.randn(2, *right_NF.shape, dtype=torch.float64,
                                     generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(choice, "_sides", lambda *_: [1])
    monkeypatch.setattr(choice, "network_features", lambda strategy, features, blocks: torch.cat(
        [right_NF + noise_NF, torch.zeros(len(right_NF), strategy.head.width)], 1))
    for spread, clearly, side in ((1.0, 3, None), (1.0, 0, 1), (0.1, 3, 1)):
        monkeypatch.setattr(choice, "CLEARLY", clearly)
        monkeypatch.setattr(choice, "pooled_cells",
                            lambda *_, spread=spread: right_NF + spread * other_NF)
        assert choice.solve(strategy, [task.train], 2).side == side


def test_a_classifier_on_the_networks_head_sees_every_block(network, with_options, tasks, images,
                                                            monkeypatch):
    """The last block's features, the trunk's means, and the means of the blocks between."""
    monkeypatch.setattr(choice, "_sides", lambda *_: [])
    config = with_options(backbone={"freeze_depth": 1}, hypernet={"starts_from": "network"})
    cut = cut_network(config, network)
    strategy = cut.strategy(config)
    strategy.add_task(2)
    strategy.begin(0)
    z_BCHW = trunk_features = cut.trunk(images[:40])
    parts = [z_BCHW.mean((2, 3))]
    for block in list(network.blocks().values())[-3:]:
        z_BCHW = block(z_BCHW)
        parts.append(z_BCHW.mean((2, 3)))
    x_NF = torch.cat([parts[-1], *parts[:-1]], 1).detach()
    manifest = dataclasses.replace(tasks[0].train.manifest,
                                   shape_VCHW=(1, *trunk_features.shape[1:]))
    features = FeatureSet(manifest, [trunk_features.detach()[:, None]], torch.arange(40) % 2,
                          [str(number) for number in range(40)])
    solved = choice.solve(strategy, [features], 2)
    assert solved.blocks == (0, 1)
    assert solved.classifier.weight_KF.shape == (2, x_NF.shape[1])
    found_NF = choice.seen(strategy, [features], None, solved.blocks).float()
    torch.testing.assert_close(found_NF, x_NF, rtol=1e-3, atol=1e-3)
    choice.take(strategy, 0, solved)
    strategy.finish(0)
    with torch.no_grad():
        found_NK = strategy.eval()(trunk_features, 0)
    wanted_NK = solved.classifier.logits(x_NF.double()).float()
    torch.testing.assert_close(found_NK, wanted_NK, rtol=0.02, atol=0.02)  # float16
    own = strategy.tasks[0]
    earlier = sum(part.shape[1] for part in parts[:-1])
    assert own.earlier_KE.shape == (2, earlier)
    assert own.earlier_KE.abs().max() > 0
    assert strategy.task_bytes(0) >= 2 * 2 * (earlier + cut.head.width)


def test_the_networks_head_may_replace_a_trained_one(from_network, tasks, monkeypatch):
    """The trained head is given up whole: its columns, its norm and its classifier."""
    monkeypatch.setattr(choice, "FEW", 1)
    monkeypatch.setattr(choice, "ENOUGH_TO_CHOOSE", 4)
    monkeypatch.setattr(choice, "_sides", lambda *_: [])
    never, _ = from_network(closed_form="never", learning_rate=5e-3, min_steps=60)
    list(never.fit_next([tasks[0]]))
    assert not has_network_head(never.strategy, 0)
    monkeypatch.setattr(experience, "average_with_ridge", lambda strategy, index, *_: (
        strategy.tasks[index].set_classifier(torch.zeros(()), torch.zeros(()))))  # it guesses now
    learned, _ = from_network(learning_rate=5e-3, min_steps=60)
    list(learned.fit_next([tasks[0]]))
    assert learned.epochs[-1].solved
    assert has_network_head(learned.strategy, 0)
    assert accuracy(*answer(learned.strategy, 0, tasks[0].test)) > 0.6


def warp(images_BCHW, rows_B, total, view, seed):
    return vary(images_BCHW, draw(rows_B, total, 16, view, "none", seed, warped=True))


def test_a_warped_image_depends_on_seed_view_and_row_alone(images):
    whole = warp(images[:6], np.arange(6), 6, 1, 0)
    part = warp(images[2:4], np.arange(2, 4), 6, 1, 0)
    assert torch.equal(part, whole[2:4])
    assert whole.dtype == torch.uint8
    for other in (warp(images[:6], np.arange(6), 6, 2, 0), images[:6]):
        assert all(not torch.equal(one, two) for one, two in zip(whole, other, strict=True))
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    assert torch.equal(warp(white, np.arange(1), 1, 1, 0), white)  # no black border comes in


def test_the_help_says_when_a_task_is_solved_in_closed_form():
    words = " ".join(inspect.getsource(TrainConfig).split())
    assert (f"with fewer than {choice.FEW} images a class or fewer than {choice.ENOUGH_TO_CHOOSE} "
            "held-out images in all") in words
    assert "two classes of up to 94 images each" in words
    counts = [held_out_share(np.repeat([0, 1], images), DataConfig().validation, "validation",
                             ("a", "b"), 0).sum() for images in (94, 95)]
    assert counts[0] < choice.ENOUGH_TO_CHOOSE <= counts[1]
