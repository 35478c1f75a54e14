"""Budgets of steps: how many passes a task gets, when it stops, and what was begun before."""

import dataclasses
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import save_file

from partialhn.checkpoints import checkpoint
from partialhn.config import BackboneConfig, Config, TrainConfig
from partialhn.features.batches import Workers, epoch_order
from partialhn.networks.backbone import build_network
from partialhn.networks.tensors import hash_tensors
from partialhn.run import run_stream
from partialhn.strategies import STRATEGIES
from partialhn.training import budget
from partialhn.training.budget import Budget, held_out_loss, task_budget, trunk_budget
from partialhn.training.image_batches import Labelled
from partialhn.training.learner import Learner
from partialhn.training.lineage import as_begun
from partialhn.training.pretrain import network_optimiser, train_network
from partialhn.training.records import EpochRecord, TaskRecord

LEARNERS = runpy.run_path(str(Path(__file__).with_name("learners.py")))
measured, weights_hash = LEARNERS["measured"], LEARNERS["weights_hash"]


@pytest.mark.parametrize(("images", "passes"), [(4500, 10), (1350, 15), (135, 143), (27, 300),
                                                (200_000, 5)])
def test_few_images_get_the_floor_of_steps_and_many_the_ceiling(images, passes):
    """With 64 images a step: 4,500 images are the ten passes of version 0.1.0."""
    found = task_budget(TrainConfig(), images, 0)
    assert passes <= found.epochs * found.passes < passes + found.passes
    assert found.epochs <= budget.MOST_EPOCHS
    assert (found.passes, found.epochs) == (1, 10) or images != 4500
    steps = found.epochs * found.passes * images / min(64, images)
    assert 300 <= steps <= 15_000 + images / 64
    assert task_budget(TrainConfig(epochs=3), images, 1000) == Budget(3)


def test_the_trunk_has_a_floor_of_its_own():
    assert trunk_budget(BackboneConfig(), 4500, 0) == Budget(15)
    small = trunk_budget(BackboneConfig(), 150, 0)
    assert small.epochs * small.passes >= 200  # two steps a pass
    assert trunk_budget(BackboneConfig(trunk_epochs=4), 150, 1000) == Budget(4)


def test_training_stops_after_epochs_without_a_smaller_loss_but_not_before_the_floor():
    plan = Budget(10, 1, patience=3, min_epochs=6)
    assert not plan.is_over([1.0, 2.0, 2.0, 2.0, 2.0])
    assert plan.is_over([1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert not plan.is_over([1.0, 2.0, 2.0, 0.9, 2.0, math.nan])
    assert plan.is_over([1.0] * 10)
    assert plan.is_over([2.0 - 0.1 * epoch for epoch in range(10)])
    assert not Budget(10).is_over([1.0] * 9)


def test_being_too_sure_is_no_loss_but_being_wrong_is():
    y_N = torch.tensor([0, 1, 0, 1])
    right_NK = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [1.0, 0.0]])
    assert held_out_loss(50 * right_NK, y_N) == pytest.approx(held_out_loss(right_NK, y_N))
    assert held_out_loss(right_NK.flip(1), y_N) > held_out_loss(right_NK, y_N)


def test_an_epoch_of_several_passes_has_every_image_in_each(tasks):
    features = tasks[0].train
    one, three = (epoch_order(features, 10, (0, 1), Workers(), passes) for passes in (1, 3))
    assert torch.equal(three.rows_EB[:4], one.rows_EB)  # one pass is what it always was
    counts = torch.bincount(three.rows_EB.flatten(), minlength=len(features))
    assert counts.tolist() == [3] * len(features)


@pytest.fixture
def learner(cut, with_options, monkeypatch):
    """A learner that stops by the eight held-out images of a tiny task."""
    monkeypatch.setattr(budget, "ENOUGH_HELD_OUT", 8)

    def new(name="partial_hn", **options):
        config = with_options(train={"strategy": name, "epochs": None, "min_steps": 6,
                                     "closed_form": "never",
                                     "learning_rate": 0.05, **options})
        return Learner(STRATEGIES[name](cut.head, cut.start, config), config.train)
    return new


@pytest.fixture
def turned(tasks):
    """Tasks whose held-out images have each other's labels: learning makes their loss larger."""
    return [dataclasses.replace(task, validation=dataclasses.replace(
        task.validation, y_N=1 - task.validation.y_N)) for task in tasks]


@pytest.mark.parametrize("name", ["partial_hn", "separate_heads"])
def test_a_task_ends_in_the_state_with_the_smallest_held_out_loss(learner, turned, name):
    learned = learner(name)
    list(learned.fit_next(turned))
    losses = [record.held_out_loss for record in learned.epochs]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert losses[best] < losses[-1]  # so the last state is not the best one
    assert len(losses) < learned.epochs[0].epochs
    again = learner(name)
    fitting = again.fit_next(turned)
    for _ in range(best + 1):
        next(fitting)
    wanted = {key: value.clone() for key, value in again.strategy.task_state(0).items()}
    again.strategy.finish(0)
    assert wanted
    assert weights_hash(learned) == weights_hash(again)


@pytest.mark.parametrize("name", ["naive", "latent_replay"])
def test_a_shared_head_does_not_stop_by_the_new_tasks_images_alone(learner, tasks, name):
    learned = learner(name)
    list(learned.learn(tasks[:1]))
    assert [record.held_out_loss for record in learned.epochs] == [None] * 10


@pytest.mark.parametrize("stop", [1, "end", 7])
def test_stopped_anywhere_the_decision_is_the_same(learner, turned, tmp_path, stop):
    """Also where training had just ended early, and its best state was not loaded yet."""
    whole, first, second = (learner() for _ in range(3))
    records = list(whole.learn(turned[:2]))
    kinds = [type(record) for record in records]
    assert len(records) < 2 * 11  # it did stop early
    running = first.learn(turned[:2])
    for _ in range(kinds.index(TaskRecord) if stop == "end" else stop):
        next(running)
    checkpoint.save(tmp_path / "state", "learner", *first.state())
    second.restore(*checkpoint.load(tmp_path / "state", "learner"))
    list(second.learn(turned[:2]))
    assert weights_hash(second) == weights_hash(whole)
    assert measured(second) == measured(whole)


def test_several_workers_stop_by_what_the_first_one_measured(learner, tasks, cut):
    """The others' running statistics of batch norm may differ."""
    def summed(total):
        return total + 0.25 if total.dtype == torch.float64 and total.dim() == 0 else total

    learned = learner()
    learned.workers = Workers(1, 2, sum_over_workers=summed)
    next(learned.fit_next(tasks))
    assert learned.epochs[0].held_out_loss == 0.25


def test_a_trunk_stops_and_goes_on_to_the_same_bits(images, monkeypatch):
    monkeypatch.setattr(budget, "ENOUGH_HELD_OUT", 8)
    config = BackboneConfig(trunk_min_steps=4, trunk_batch_size=16, trunk_learning_rate=0.02)
    y_N = torch.arange(64) % 2
    shown, held_out = Labelled(images[:32], y_N[:32]), Labelled(images[:32], 1 - y_N[:32])

    def train(network, optimiser, done=0, best=None, epochs=99):
        records = train_network(network, shown, config, "crop", optimiser, held_out=held_out,
                                epochs_done=done, best=best)
        return [record for _, record in zip(range(epochs), records, strict=False)]

    whole = build_network("slim_resnet18", 2, 0)
    records = train(whole, network_optimiser(whole, config))
    assert len(records) < records[0].epochs
    again, best = build_network("slim_resnet18", 2, 0), budget.BestState()
    optimiser = network_optimiser(again, config)
    first = train(again, optimiser, best=best, epochs=3)
    kept = budget.BestState(json.loads(json.dumps(best.losses)), best.tensors)
    rest = train(again, optimiser, 3, kept)
    assert [record.held_out_loss for record in first + rest] == [
        record.held_out_loss for record in records]
    assert hash_tensors(again.state_dict()) == hash_tensors(whole.state_dict())


def stored_with(tmp_path, config):
    """A learned model's folder, as far as it says with which options it was learned."""
    checkpoint.save(tmp_path / "learned" / "some-id", "model", {"a": torch.zeros(1)},
                    {"config": config.to_dict()})
    return lambda given: as_begun(given, LocalFileSystem(), str(tmp_path / "learned"))


def test_a_stream_that_was_begun_with_the_defaults_of_0_1_0_goes_on_with_them(tmp_path):
    now, old = Config(), Config().with_first_values()
    begun = stored_with(tmp_path, old)
    assert begun(now) == old
    assert begun(old) == old
    other = dataclasses.replace(now, train=dataclasses.replace(now.train, learning_rate=0.5))
    assert begun(other) == other  # a stream that was begun with other options is no such stream
    given = dataclasses.replace(now, train=dataclasses.replace(now.train, epochs=10))
    assert begun(given) == old
    compared = dataclasses.replace(now, train=dataclasses.replace(now.train, compare=("naive",)))
    assert begun(compared).train.epochs == 10


def test_a_stream_that_was_begun_with_fitting_budgets_keeps_them(tmp_path):
    begun = stored_with(tmp_path, Config())
    assert begun(Config()) == Config()
    assert as_begun(Config(), LocalFileSystem(), str(tmp_path / "nothing")) == Config()


def test_a_whole_stream_is_found_again_by_the_options_it_was_begun_with(config, network, tmp_path):
    """As a user of 0.1.0 would see it: the same command, today without passes."""
    save_file(network.state_dict(), tmp_path / "trunk.safetensors")
    now = dataclasses.replace(
        config, data=dataclasses.replace(config.data, tasks=None, task_sizes=(2, 2), classes=4),
        backbone=dataclasses.replace(config.backbone, trunk=str(tmp_path / "trunk.safetensors"),
                                     freeze_depth=4, trunk_epochs=None),
        train=dataclasses.replace(config.train, strategy="linear_probe", epochs=None))
    old = run_stream(now.with_first_values(), tmp_path / "old")
    records = []
    again = run_stream(now, tmp_path / "old", records.append)
    assert not [record for record in records if isinstance(record, EpochRecord)]
    assert again.model.weights_hash() == old.model.weights_hash()
    new = run_stream(now, tmp_path / "new")
    assert new.model.config == now
    assert max(record["epoch"] * record["passes"] for record in new.fields["epochs"]) > 10
    assert run_stream(now, tmp_path / "new").model.weights_hash() == new.model.weights_hash()


def test_values_that_are_given_stay_when_the_first_ones_are_filled_in():
    given = Config(train=TrainConfig(epochs=3))
    assert given.with_first_values().train.epochs == 3
    assert given.with_first_values().backbone.trunk_epochs == 15
    assert given.with_first_values().with_first_values() == given.with_first_values()
