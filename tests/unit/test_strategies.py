"""Strategies: nothing forgotten while columns are fresh, drift held back by the regulariser."""

import copy
import dataclasses
import math

import pytest
import torch

from partialhn.config import BackboneConfig, Config, HypernetConfig
from partialhn.errors import InputError
from partialhn.networks.columns import CODE
from partialhn.networks.cut import CutNetwork
from partialhn.run import cut_network
from partialhn.strategies import STRATEGIES
from partialhn.strategies.partial_hn import PartialHypernet

STEPS = 4


@pytest.fixture
def build(cut, config):
    def make(name="partial_hn", **options):
        changed = dataclasses.replace(config,
                                      hypernet=dataclasses.replace(config.hypernet, **options))
        return STRATEGIES[name](cut.head, cut.start, changed)
    return make


def learn(strategy, task, features, steps=STEPS, rate=1e-2):
    """A few real steps of one task; returns the regulariser at each of them."""
    if task == len(strategy.classes):
        strategy.add_task(2)
    strategy.begin(task)
    strategy.train()
    optimiser = torch.optim.Adam([p for p in strategy.parameters() if p.requires_grad], lr=rate)
    rows, held = torch.arange(16), []
    z_BCHW = features.train.gather(rows, torch.zeros_like(rows))
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(strategy(z_BCHW, task), features.train.y_N[rows])
        regulariser = strategy.regulariser(task)
        if regulariser is not None:
            held.append(regulariser.item())
            loss = loss + regulariser
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    strategy.finish(task)
    strategy.eval()
    return held


@torch.no_grad()
def snapshot(strategy, task):
    weights = strategy.weights(task)
    return {**{key: value.clone() for key, value in weights.matrices.items()},
            "norm": weights.norm.clone(), "classifier": weights.classifier_KF.clone(),
            "bias": weights.bias_K.clone()}


def distance(one, two):
    return sum((one[key] - two[key]).square().sum() for key in one).item()


def test_earlier_tasks_keep_every_bit_while_columns_are_fresh(build, tasks):
    strategy = build(fresh_columns=4)
    kept = []
    for task in range(4):
        assert learn(strategy, task, tasks[task]) == []
        kept.append(snapshot(strategy, task))
        for earlier, before in enumerate(kept):
            now = snapshot(strategy, earlier)
            assert [key for key in before if not torch.equal(before[key], now[key])] == []
    assert all(distance(one, two) > 1e-3 for i, one in enumerate(kept) for two in kept[:i])
    codes = [own.code for own in strategy.tasks]
    assert [len(code) for code in codes] == [0, *[4 * len(strategy.head.matrices)] * 3]
    assert all(code.all() for code in codes)


def test_what_all_tasks_share_drifts_with_the_regulariser(build, tasks):
    strategy = build(generator="bilinear")
    for task in range(3):
        learn(strategy, task, tasks[task])
    before = [snapshot(strategy, task) for task in range(3)]
    held = learn(strategy, 3, tasks[3])
    assert held[0] == 0.0
    assert held[-1] > 0.0
    assert distance(before[0], snapshot(strategy, 0)) > 0
    moved = [sum((before[task][key] - snapshot(strategy, task)[key]).square().sum()
                 for key in strategy.weights(task).matrices) for task in range(3)]
    strategy.beta = 1.0
    torch.testing.assert_close(strategy.regulariser(3), torch.stack(moved).mean(),
                               rtol=1e-3, atol=0)


@pytest.mark.parametrize("generator", ["bilinear", "additive"])
@pytest.mark.parametrize("residual", [True, False])
def test_more_beta_less_drift(build, tasks, generator, residual):
    drifts = []
    for beta in (0.0, 1e-2, 1.0):
        strategy = build(generator=generator, residual=residual, beta=beta)
        learn(strategy, 0, tasks[0])
        learn(strategy, 1, tasks[1])
        before = snapshot(strategy, 1)
        learn(strategy, 2, tasks[2], steps=10, rate=1e-3)
        drifts.append(distance(before, snapshot(strategy, 1)))
    assert drifts[0] > 0
    assert drifts[0] > 2 * drifts[1] > 2 * drifts[2]


def test_a_regulariser_of_no_strength_is_not_computed(build, tasks):
    strategy = build(generator="bilinear", beta=0.0)
    learn(strategy, 0, tasks[0])
    assert learn(strategy, 1, tasks[1]) == []


@pytest.mark.parametrize("name", [name for name in STRATEGIES
                                  if name not in ("latent_replay", "joint")])  # train them on
def test_finished_tasks_take_no_gradient_and_do_not_move(build, tasks, name):
    strategy = build(name)
    learn(strategy, 0, tasks[0])
    before = {key: value.clone() for key, value in strategy.tasks[0].state_dict().items()}
    learn(strategy, 1, tasks[1])
    assert not any(value.requires_grad for value in strategy.tasks[0].parameters())
    assert all(value.requires_grad for value in strategy.tasks[1].parameters())
    after = strategy.tasks[0].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    groups = strategy.parameter_groups(1e-3)
    listed = {id(value) for group in groups for value in group["params"]}
    assert listed == {id(value) for value in strategy.parameters() if value.requires_grad}


@pytest.mark.parametrize("name", STRATEGIES)
def test_first_weights_depend_on_seed_and_position_alone(build, name):
    torch.manual_seed(1)
    one = build(name)
    one.add_task(2)
    one.add_task(3)
    torch.manual_seed(2)
    two = build(name)
    two.add_task(2)
    state = torch.get_rng_state()
    two.add_task(3)
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


def test_tasks_have_their_own_numbers_of_classes(build, tasks):
    strategy = build()
    z_BCHW = tasks[0].train.gather(torch.arange(3), torch.zeros(3, dtype=torch.int64))
    for classes in (2, 5, 1):
        strategy.add_task(classes)
    assert [strategy(z_BCHW, task).shape[1] for task in range(3)] == [2, 5, 1]
    with pytest.raises(InputError, match="a task has 0 classes"):
        strategy.add_task(0)


def test_a_new_task_starts_from_the_one_before(build, tasks):
    strategy = build(generator="bilinear")
    learn(strategy, 0, tasks[0])
    learn(strategy, 1, tasks[1])
    strategy.add_task(2)
    old, new = strategy.tasks[1], strategy.tasks[2]
    assert torch.equal(new.code, old.code)
    assert new.norm.data_ptr() != old.norm.data_ptr()
    assert new.code.data_ptr() != old.code.data_ptr()


def test_separate_heads_share_nothing(build, tasks):
    strategy = build("separate_heads")
    learn(strategy, 0, tasks[0])
    learn(strategy, 1, tasks[1])
    names = [name for name, _ in strategy.named_parameters() if not name.startswith("tasks.")]
    assert names == []
    assert strategy.task_bytes(1) > 4 * strategy.head.weight_count


def test_a_task_of_the_hypernetwork_is_small(build):
    """Eight signs in a byte, codes in float32, everything else in float16."""
    strategy = build(fresh_columns=4)
    for task in range(3):
        strategy.add_task(2)
        strategy.finish(task)
    own = 2 * (strategy.head.norm_length + 2 * 160 + 2)
    columns = math.ceil(4 * sum(t.rows + t.row_length for t in strategy.head.matrices) / 8)
    codes = 4 * 4 * len(strategy.head.matrices)
    assert [strategy.task_bytes(task) for task in range(3)] == [
        own, own + codes + columns, own + codes + columns]
    assert strategy.task_bytes(2) < 0.005 * build("separate_heads").head.weight_count * 4


def test_the_checkpoint_grows_by_what_a_task_is_said_to_add(build):
    strategy = build(fresh_columns=4)
    place = torch.tensor(0).nbytes  # of the task it starts from

    def size():
        return sum(value.nbytes for value in strategy.state_dict().values())

    for task in range(4):
        before = size()
        strategy.add_task(3)
        strategy.finish(task)
        assert size() - before == strategy.task_bytes(task) + place


def test_a_refreshed_task_starts_from_its_own_weights(build, tasks):
    strategy = build(fresh_columns=4)
    for task in range(3):
        learn(strategy, task, tasks[task])
    strategy.add_task(tasks[1].classes, refreshes=1)
    torch.testing.assert_close(strategy.weights(3).matrices, strategy.weights(1).matrices,
                               rtol=0, atol=0)
    assert torch.equal(strategy.tasks[3].code, torch.full_like(strategy.tasks[1].code, CODE / 2))
    before = snapshot(strategy, 1)
    learn(strategy, 3, tasks[1])
    after = snapshot(strategy, 3)
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(value, before[key]) for key, value in snapshot(strategy, 1).items())


def test_what_a_learned_task_answers_does_not_depend_on_what_was_asked_before(build, tasks):
    """Weights of a line of tasks are made one from the other: from any place, the same bits."""
    strategy = build(fresh_columns=4)
    for task in range(5):
        learn(strategy, task, tasks[task])
    strategy.add_task(2, refreshes=1)
    learn(strategy, 5, tasks[1])
    first = {}
    for task in (5, 0, 4, 2, 3, 1, 5, 4, 4, 0, 2):
        now = snapshot(strategy, task)
        wanted = first.setdefault(task, now)
        assert all(torch.equal(now[key], wanted[key]) for key in now), task


def test_weights_kept_from_before_are_not_used_after_loading_others(build, tasks):
    one, two = build(fresh_columns=4), build(fresh_columns=4)
    for strategy, order in ((one, (0, 1, 2)), (two, (0, 2, 1))):
        for place, task in enumerate(order):
            learn(strategy, place, tasks[task])
    before = snapshot(one, 2)
    one.load_state_dict(two.state_dict())
    after, wanted = snapshot(one, 2), snapshot(two, 2)
    assert all(torch.equal(after[key], wanted[key]) for key in wanted)
    assert not all(torch.equal(after[key], before[key]) for key in before)
    double = copy.deepcopy(one).double()  # a copy: all tests share the head
    assert double.weights(2).matrices["0.0.conv2.weight"].dtype == torch.float64


def test_restoring_what_a_strategy_does_not_use(build):
    with pytest.raises(InputError, match="which Naive does not use"):
        build("naive").restore_experience({"A.0": torch.zeros(1)})
    build("naive").restore_experience({})


def test_the_beginning_of_a_stream_has_no_regulariser(cut):
    config = HypernetConfig(generator="bilinear", residual=False, code_dim=8)
    strategy = PartialHypernet(cut.head, cut.start, Config(hypernet=config))
    strategy.add_task(2)
    strategy.begin(0)
    assert strategy.regulariser(0) is None


def test_a_new_task_starts_from_the_norm_that_was_learned_not_from_the_folded_one(build):
    strategy = build()
    strategy.add_task(2)
    strategy.begin(0)
    own = strategy.tasks[0]
    with torch.no_grad():
        own.norm.add_(0.25)
        own.statistics.mul_(4.0).add_(0.5)
    learned = own.norm.detach().clone()
    strategy.finish(0)
    assert not torch.allclose(own.norm.float(), learned)
    strategy.add_task(2)
    assert torch.equal(strategy.tasks[1].norm, learned)


@pytest.mark.parametrize("start", ["first", "previous"])
def test_where_a_task_starts(build, start):
    """Weights and norm of the first: tasks that differ do not have to be undone, and none needs
    another. Or of the one before.
    """
    strategy = build(starts_from=start)
    for task in range(3):
        strategy.add_task(2)
        strategy.begin(task)
        with torch.no_grad():
            for value in strategy.parameters():
                if value.requires_grad:
                    value.add_(torch.randn_like(value))
        strategy.finish(task)
    place, other = (0, 2) if start == "first" else (2, 0)
    wanted, refused = strategy.weights(place), strategy.weights(other)
    second = strategy.weights(1)
    strategy.add_task(2)
    strategy.begin(3)
    new = strategy.weights(3)
    for name, weight in new.matrices.items():
        assert torch.equal(weight, wanted.matrices[name])
        assert not torch.equal(weight, refused.matrices[name])
    kept = {name: value.clone() for name, value in strategy.weights(2).matrices.items()}
    with torch.no_grad():
        strategy.tasks[1].code.zero_()
    for name, weight in strategy.weights(2).matrices.items():
        assert torch.equal(weight, kept[name]) == (start == "first")
    assert not torch.equal(strategy.weights(1).matrices["0.0.conv2.weight"],
                           second.matrices["0.0.conv2.weight"])


@pytest.mark.parametrize("name", ["partial_hn", "separate_heads", "naive", "latent_replay"])
def test_with_everything_frozen_the_head_is_a_linear_probe(network, with_options, images, name):
    """Standardised pooled features and the rate that a linear layer needs: nothing less."""
    config = with_options(backbone={"freeze_depth": 4}, train={"strategy": name})
    strategy = cut_network(config, network).strategy(config)
    strategy.add_task(3)
    strategy.begin(0)
    assert not strategy.head.matrices
    assert strategy.head.norm_length == 2 * network.width
    assert [group["peak"] for group in strategy.parameter_groups(1e-3)] == [0.01]
    z_BCHW = CutNetwork.of(network, 4).trunk(images[:32])
    strategy.train()
    embedded_BF = strategy.head.embed(z_BCHW, strategy.weights(0))
    torch.testing.assert_close(embedded_BF.mean(0), torch.zeros(network.width), atol=1e-5, rtol=0)
    shallower = with_options(backbone={"freeze_depth": 3}, train={"strategy": name})
    strategy = cut_network(shallower, network).strategy(shallower)
    strategy.add_task(3)
    strategy.begin(0)
    assert [group["peak"] for group in strategy.parameter_groups(1e-3)] == [1e-3]


def test_in_long_tasks_columns_learn_faster_than_what_was_learned_before(build, tasks):
    strategy = build()
    learn(strategy, 0, tasks[0])
    strategy.add_task(2)
    strategy.begin(1)
    rest, columns = strategy.parameter_groups(1e-3)
    assert (rest["peak"], rest["long_peak"]) == (columns["peak"], 1e-3) == (1e-3, 1e-3)
    assert columns["long_peak"] == 2e-3
    assert {id(value) for value in columns["params"]} == {
        id(strategy.tasks[1].code), *map(id, strategy.hypernet.columns[0].parameters())}
    bilinear = build(generator="bilinear")
    learn(bilinear, 0, tasks[0])
    bilinear.add_task(2)
    bilinear.begin(1)
    assert [group["long_peak"] for group in bilinear.parameter_groups(1e-3)] == [1e-3]


def test_from_the_network_every_task_has_columns_and_the_networks_weights_stay(build, tasks):
    strategy = build(starts_from="network", fresh_columns=4)
    base = [value.clone() for value in strategy.hypernet.base]
    kept = []
    for task in range(3):
        strategy.add_task(2)
        assert int(strategy.tasks[task].start) == -1
        assert len(strategy.tasks[task].code) == 4 * len(strategy.head.matrices)
        for value, weight in zip(strategy.weights(task).matrices.values(), base, strict=True):
            assert torch.equal(value.reshape(weight.shape), weight)  # columns start at zero
        learn(strategy, task, tasks[task])
        kept.append(snapshot(strategy, task))
        for earlier, before in enumerate(kept):
            now = snapshot(strategy, earlier)
            assert [key for key in before if not torch.equal(before[key], now[key])] == []
    assert all(torch.equal(value, weight)
               for value, weight in zip(strategy.hypernet.base, base, strict=True))
    assert all(distance(one, two) > 1e-3 for i, one in enumerate(kept) for two in kept[:i])
    assert strategy.independent
    assert strategy.task_bytes(0) == strategy.task_bytes(1)


def test_from_the_network_a_task_is_loaded_into_another_instance(build, tasks):
    one, other = (build(starts_from="network", fresh_columns=4) for _ in range(2))
    for task in range(3):
        learn(one, task, tasks[task])
        other.add_task(2)
        other.finish(task)
    for task in (0, 2, 1):
        other.load_task_state(task, one.task_state(task))
    for task in range(3):
        assert all(torch.equal(value, snapshot(other, task)[key])
                   for key, value in snapshot(one, task).items())


def test_where_a_task_starts_is_decided_by_the_trunk():
    trained = Config()
    assert trained.hypernet.starts_from == "first"
    elsewhere = BackboneConfig(backbone="timm:resnet18", trunk="some.safetensors")
    assert Config(backbone=elsewhere).hypernet.starts_from == "network"
    here = BackboneConfig(backbone="timm:resnet18")
    assert Config(backbone=here).hypernet.starts_from == "first"
    stages = BackboneConfig(backbone="resnet18", trunk="some.safetensors")
    assert Config(backbone=stages).hypernet.starts_from == "first"  # as version 0.1.0 did
    asked = Config(backbone=elsewhere, hypernet=HypernetConfig(starts_from="first"))
    assert asked.hypernet.starts_from == "first"


@pytest.mark.parametrize(("norm", "start", "decided"), [
    ("auto", "network", "network"), ("batch", "network", "batch"),
    ("network", "network", "network"), ("instance", "first", "instance"),
    ("group", "first", "group"), ("layer", "first", "layer")])
def test_no_task_starts_from_a_network_whose_weights_do_not_fit_its_norm(norm, start, decided):
    elsewhere = BackboneConfig(backbone="timm:tf_efficientnet_lite0", trunk="some.safetensors")
    config = Config(backbone=elsewhere, hypernet=HypernetConfig(norm=norm))
    assert (config.hypernet.starts_from, config.hypernet.norm) == (start, decided)
    asked = Config(backbone=elsewhere, hypernet=HypernetConfig(norm=norm, starts_from="network"))
    assert asked.hypernet.starts_from == "network"
