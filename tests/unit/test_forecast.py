"""Probes and alignment against closed forms and brute force."""

import dataclasses

import pytest
import torch

from partialhn.evaluation.forecast import (
    ProbeTask,
    forecast,
    linear_cka,
    pooled,
    probe_accuracy,
    task_shift,
)
from partialhn.features.closed_form import one_hot


def gaussians(count, classes, distance, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y_N = torch.arange(count) % classes
    centres_KD = distance * torch.eye(classes, 20)
    return centres_KD[y_N] + torch.randn(count, 20, generator=generator), y_N


def test_cka_of_a_thing_with_itself_turned_and_scaled_is_one():
    x_ND = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    turn_DD = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    assert linear_cka(x_ND, 3 * x_ND @ turn_DD + 5) == pytest.approx(1)


def test_cka_by_hand():
    # centred x = (-1, 1, -1, 1), y = (-1, -1, 1, 1): orthogonal; and with itself
    x_ND, y_NK = torch.tensor([[0.], [2.], [0.], [2.]]), torch.tensor([[0.], [0.], [2.], [2.]])
    assert linear_cka(x_ND, y_NK) == 0
    both_ND = torch.cat([x_ND, y_NK], 1)
    # |y^T both|^2 = 16, |both^T both| = |diag(4, 4)| = 4 sqrt 2, |y^T y| = 4
    assert linear_cka(both_ND, y_NK) == pytest.approx(16 / (4 * 2**0.5 * 4))
    assert linear_cka(torch.zeros(4, 1), y_NK) == 0


def test_a_probe_finds_what_is_there_and_nothing_else():
    x_ND, y_N = gaussians(400, 4, 6.0)
    held_ND, held_N = gaussians(200, 4, 6.0, seed=1)
    assert probe_accuracy(x_ND, y_N, held_ND, held_N, 4) > 0.98
    noise_ND = torch.randn(400, 20, generator=torch.Generator().manual_seed(3))
    assert probe_accuracy(noise_ND, y_N, held_ND, held_N, 4) < 0.45


def test_the_penalty_is_the_one_with_the_best_leave_one_out_error():
    """With more features than images an unpenalised probe would fit everything and know nothing."""
    x_ND, y_N = gaussians(30, 2, 3.0)
    extra_ND = torch.randn(30, 200, generator=torch.Generator().manual_seed(4))
    held_ND, held_N = gaussians(200, 2, 3.0, seed=1)
    noise_ND = torch.randn(200, 200, generator=torch.Generator().manual_seed(5))
    found = probe_accuracy(torch.cat([x_ND, 0.05 * extra_ND], 1), y_N,
                           torch.cat([held_ND, 0.05 * noise_ND], 1), held_N, 2)
    assert found > 0.6


def test_a_task_like_the_first_has_no_shift_and_one_elsewhere_has():
    first_ND = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    first_ND[:, 4:] *= 1e-3
    assert task_shift(first_ND, first_ND) < 0.11
    assert task_shift(first_ND, first_ND.flip(1)) > 0.99


def test_pooled_features_are_the_mean_over_quarters(tasks):
    features = tasks[0].train
    x_ND = pooled(features)
    z_CHW = features.shards[0][0, 0].float()
    assert x_ND.shape == (len(features), 4 * z_CHW.shape[0])
    half = z_CHW.shape[1] // 2
    assert x_ND[0, 0] == pytest.approx(z_CHW[0, :half, :half].mean().item(), rel=1e-5)


def test_a_forecast_of_real_digits(tasks):
    """A depth whose second task lost what the first has keeps less and is doubtful."""
    one, two = (ProbeTask(task.train, task.test, task.classes) for task in tasks[:2])
    same = forecast({2: (one, one), 3: (one, two)})
    assert [stage.depth for stage in same] == [2, 3]
    assert same[0].kept == pytest.approx(1)
    assert same[0].worth_trying
    order = torch.randperm(len(two.train), generator=torch.Generator().manual_seed(0))
    train = dataclasses.replace(two.train, y_N=two.train.y_N[order])
    shuffled = ProbeTask(train, two.held_out, two.classes)
    doubtful = forecast({2: (one, one), 3: (one, shuffled)})[1]
    assert doubtful.kept < 0.6
    assert not doubtful.worth_trying


def test_a_trunk_that_was_trained_elsewhere_prefers_no_task(tasks):
    """A second task that is the easier one says nothing about freezing; a worse depth does."""
    one = ProbeTask(tasks[0].train, tasks[0].test, tasks[0].classes)
    order = torch.randperm(len(one.train), generator=torch.Generator().manual_seed(0))
    bad = dataclasses.replace(one, train=dataclasses.replace(one.train,
                                                             y_N=one.train.y_N[order]))
    stages = forecast({2: (bad, one), 3: (one, one), 4: (one, bad), 5: (one, one)},
                      trained_here=False)
    assert [stage.kept for stage in (stages[0], stages[1], stages[3])] == [1, 1, 1]
    assert stages[2].kept < 0.75
    assert [stage.worth_trying for stage in stages] == [True, True, False, True]
    assert stages[0].expected == stages[2].expected < stages[1].expected == stages[3].expected


def test_a_probe_that_guesses_on_the_first_task_makes_no_depth_doubtful(tasks):
    """A share of nothing is no number, and one of next to nothing puts no other depth in doubt."""
    one = ProbeTask(tasks[0].train, tasks[0].test, tasks[0].classes)
    opposite = dataclasses.replace(one, train=dataclasses.replace(
        one.train, y_N=one.classes - 1 - one.train.y_N))
    guessed, good = forecast({2: (opposite, one), 3: (one, one)})
    assert (guessed.probe_first, guessed.kept, guessed.expected) == (0, None, None)
    assert guessed.worth_trying
    assert good.worth_trying
    half = one.train.y_N.clone()
    half[::2] = one.classes - 1 - half[::2]
    weak = dataclasses.replace(one, train=dataclasses.replace(one.train, y_N=half))
    easier, level = forecast({2: (weak, one), 3: (one, one)})
    assert easier.kept > 1 / 0.75, "the second task is the easier one"
    assert level.kept == 1
    assert level.worth_trying, "nothing is lost there"


@pytest.mark.parametrize("trained_here", [True, False])
def test_a_task_of_one_class_says_nothing(tasks, trained_here):
    two = ProbeTask(tasks[0].train, tasks[0].test, tasks[0].classes)
    one = ProbeTask(*(dataclasses.replace(each, y_N=torch.zeros_like(each.y_N))
                      for each in (two.train, two.held_out)), 1)
    for pair in ((one, two), (two, one), (one, one)):
        [stage] = forecast({3: pair}, trained_here=trained_here)
        known = not trained_here and any(each is two for each in pair)
        assert stage.kept == (1 if known else None)
        assert stage.worth_trying


def test_one_hot_labels():
    assert one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
