"""The detector: exact in any order, exact removal, its closed form, its mixture with the heads."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.detector import fitted
from partialhn.detector.detector import Detector
from partialhn.detector.expansion import SEEN, Expansion, expansion_of, scaled, seen_blocks
from partialhn.detector.fitted import (
    LEAST_SHARP,
    SHARPEST,
    SHRINKAGES,
    TOLERANCE,
    fit,
    sharpness,
    spectrum,
)
from partialhn.detector.mixture import DRAWN, POWER, Powers, answer, fit_powers, mixed, usual_top
from partialhn.detector.solved import threshold_of
from partialhn.detector.statistics import (
    SAMPLE,
    UNIT,
    TaskStatistics,
    expanded,
    packed,
    spread_over,
    unpacked,
)
from partialhn.errors import InputError, IntegrityError
from partialhn.evaluation.task_inference_metrics import (
    auroc,
    rejection_auroc,
    right_without_task,
    without_task_id,
)
from partialhn.features.feature_set import join
from partialhn.networks.cut import CutNetwork
from partialhn.networks.tensors import hash_tensors
from partialhn.networks.trunk import run_trunk
from partialhn.predict import Predictor
from partialhn.run import cut_network
from partialhn.strategies import STRATEGIES
from partialhn.training.learner import Learner
from partialhn.training.records import class_incremental

INFOS = tuple(TaskInfo(name, (f"{name}-0", f"{name}-1")) for name in ("a", "b", "c"))
FEATURES = 16


def plain(features):
    rows = torch.arange(len(features))
    return features.gather(rows, torch.zeros_like(rows))


@pytest.fixture(scope="module")
def learner(cut, tasks, config):
    made = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train,
                   inference=Detector(FEATURES))
    list(made.learn(tasks[:3]))
    return made


@pytest.fixture(scope="module")
def weights(learner):
    return [learner.strategy.weights(task) for task in range(3)]


@pytest.fixture(scope="module")
def measured(learner, tasks, weights):
    """The statistics of every task, as one machine would compute them."""
    return [Detector(FEATURES).statistics(
        task.train, task.validation, task.classes,
        own and learner.strategy.head(plain(task.validation), own).detach())
            for task, own in itertools.zip_longest(tasks, weights)]


def detector_of(measured, order):
    detector = Detector(FEATURES)
    for task in order:
        detector.add_task(measured[task])
    return detector


def same_answers(one, slots, other, other_slots, learner, weights, z_BCHW):
    """Two detectors give the same bits about some images; weights: of the heads of the slots."""
    first, second = (detector.infer(learner.strategy.head, own, weights, z_BCHW)
                     for detector, own in ((one, slots), (other, other_slots)))
    assert torch.equal(first.strange_B, second.strange_B)
    assert torch.equal(first.known_B, second.known_B)
    assert all(map(torch.equal, first.joint, second.joint))


def test_an_expansion_is_a_function_of_one_image(tasks):
    z_BCHW, expansion = plain(tasks[0].test), expansion_of(tasks[0].test.shape_CHW, FEATURES)
    together = expansion(z_BCHW)
    assert together.shape == (len(z_BCHW), expansion.width)
    torch.testing.assert_close(expansion(z_BCHW[3:4]), together[3:4], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expansion(5 * z_BCHW), together, rtol=1e-4, atol=1e-4)


def test_an_expansion_by_hand():
    z_CHW = torch.tensor([[[3.0, 0.0]], [[4.0, 0.0]]])
    first, second = np.random.RandomState(0).standard_normal((1, 2))[0] / np.sqrt(2)
    h_D = Expansion(2, True, 1)(z_CHW[None])[0]
    scale = np.sqrt(2) / 5
    expected = [3 * scale, 4 * scale, 3 * scale, 4 * scale,
                max(0, first * 3 * scale + second * 4 * scale) / 2]
    np.testing.assert_allclose(h_D, expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 49, 1), (3, 20, 30)])
def test_any_shape_of_features_has_the_width_it_says(shape):
    expansion = expansion_of(shape, 5)
    h_BD = expansion(torch.rand(4, *shape, generator=torch.Generator().manual_seed(0)))
    assert h_BD.shape == (4, expansion.width) == (4, 3 * (1 + (shape[1] > 1)) + 5)
    assert torch.isfinite(h_BD).all()
    assert expansion(torch.zeros(0, *shape)).shape == (0, expansion.width)


def test_a_packed_matrix_is_exact_to_its_unit():
    matrix = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = matrix + matrix.T
    again = unpacked(packed(matrix), 5)
    assert torch.equal(again, again.T)
    assert (again - matrix).abs().max() <= UNIT / 2


def test_the_scatter_is_the_sum_around_class_means(measured, tasks):
    train = tasks[1].train
    expansion = expansion_of(train.shape_CHW, FEATURES)
    h_ND, y_N = expanded(expansion, train, torch.arange(len(train)))
    h_ND, y_N = h_ND.double().numpy(), y_N.numpy()
    means = np.stack([h_ND[y_N == label].mean(0) for label in range(2)])
    centred = h_ND - means[y_N]
    np.testing.assert_allclose(unpacked(measured[1].scatter_P, expansion.width),
                               centred.T @ centred, atol=1e-4)
    np.testing.assert_allclose(measured[1].mean_KD.float(), means, rtol=1e-3, atol=1e-4)
    assert measured[1].images.tolist() == [len(train), len(train)]


def test_three_orders_of_arrival_give_the_same_bits_and_answers(measured, learner, tasks, weights):
    first = detector_of(measured, (0, 1, 2))
    z_BCHW = torch.cat([plain(task.test) for task in tasks[:3]])
    joint, strange_B, _ = first.infer(learner.strategy.head, range(3), weights, z_BCHW)
    for order in ((2, 0, 1), (1, 2, 0)):
        other = detector_of(measured, order)
        assert torch.equal(other.scatter_P, first.scatter_P)
        slots = [order.index(task) for task in range(3)]
        again, again_strange_B, _ = other.infer(learner.strategy.head, slots, weights, z_BCHW)
        assert torch.equal(again.task_B, joint.task_B)
        torch.testing.assert_close(again_strange_B, strange_B, rtol=1e-6, atol=1e-6)
        assert other.threshold(slots) == pytest.approx(first.threshold(range(3)), abs=1e-6)
        torch.testing.assert_close(again.p_BL, joint.p_BL, rtol=1e-6, atol=1e-6)


def test_a_task_that_is_taken_out_was_never_in(measured, learner, tasks, weights):
    detector, without = detector_of(measured, (0, 1, 2)), detector_of(measured, (0, 2))
    detector.remove_task(1, tasks[1].train)
    assert torch.equal(detector.scatter_P, without.scatter_P)
    z_BCHW = plain(tasks[2].test)
    for found, expected in zip(detector.classify((0, 2), z_BCHW), without.classify((0, 1), z_BCHW),
                               strict=True):
        assert torch.equal(found, expected)
    same_answers(detector, (0, 2), without, (0, 1), learner, weights[::2], z_BCHW)
    assert detector.slots[1]["mean_KD"].isnan().all()
    assert detector.slots[1]["energy"].isnan().all()
    assert not detector.slots[1]["sample_SD"].numel()


def test_a_refresh_takes_off_what_the_task_had_added(measured, learner, tasks, weights):
    whole = join([tasks[1].train, tasks[4].train])
    detector, fresh = detector_of(measured, (0, 1)), detector_of(measured, (0,))
    fresh.add_task(fresh.statistics(whole, tasks[1].validation, 2))
    detector.add_task(detector.statistics(whole, tasks[1].validation, 2, refreshes=1), refreshes=1)
    assert torch.equal(detector.scatter_P, fresh.scatter_P)
    z_BCHW = plain(tasks[0].test)
    same_answers(detector, (0, 2), fresh, (0, 1), learner, weights[:2], z_BCHW)


def test_a_task_without_held_out_images_leaves_some_out_of_the_sums(tasks):
    statistics = Detector(FEATURES).statistics(tasks[0].train, None, 2)
    kept = len(statistics.sample_y_S)
    assert 0 < kept <= SAMPLE
    assert statistics.images.tolist() == [len(tasks[0].train) - kept, len(tasks[0].train)]
    assert not len(statistics.sample_head_SK)
    detector = Detector(FEATURES)
    detector.add_task(statistics)
    detector.remove_task(0, tasks[0].train)
    assert not detector.scatter_P.any()


def test_a_class_without_images_is_never_the_answer(measured, learner, tasks, weights):
    odd = dataclasses.replace(tasks[0].train, y_N=torch.ones_like(tasks[0].train.y_N))
    detector = Detector(FEATURES)
    detector.add_task(detector.statistics(odd, None, 2))
    detector.add_task(measured[1])
    task_B, class_B = detector.classify((0, 1), plain(tasks[0].test))
    assert ((task_B == 1) | (class_B == 1)).all()
    assert torch.isfinite(detector.infer(learner.strategy.head, (0, 1), weights[:2],
                                         plain(tasks[0].test)).strange_B).all()


def test_the_classifier_is_ridge_regression_with_the_penalty_of_cross_validation():
    """Its weights are those of one-hot targets where every class counts alike, and its penalty is
    the smallest whose generalised cross-validation error is within `TOLERANCE` of the least.
    """
    rng = np.random.default_rng(0)
    y_N = np.repeat(np.arange(3), 15)
    x_2NF = rng.normal(size=(2, 45, 30)) + 0.5 * rng.normal(size=(3, 30))[y_N]
    x_NF, sample_SF = x_2NF[0], torch.from_numpy(x_2NF[1])
    means = np.stack([x_NF[y_N == label].mean(0) for label in range(3)])
    centred, around, targets = x_NF - means[y_N], x_NF - means.mean(0), np.eye(3)[y_N]
    scatter = centred.T @ centred
    fitted = fit(torch.from_numpy(scatter), 45, torch.from_numpy(means),
                 sample_SF, torch.from_numpy(y_N), 2)

    def solved(shrinkage):
        penalty = shrinkage * np.trace(scatter / 45) / 30
        inverse = np.linalg.inv(around.T @ around / 45 + penalty * np.eye(30))
        hat = around @ inverse @ around.T / 45 + 1 / 45
        error = ((targets - hat @ targets)**2).sum() / (1 - np.trace(hat) / 45)**2
        return inverse @ around.T @ targets / 45, error

    errors = [solved(shrinkage)[1] for shrinkage in SHRINKAGES]
    close = np.array(errors) <= (1 + TOLERANCE) * min(errors)
    assert 0 < np.argmax(close) < np.argmin(errors), "the data must be so that both choose"
    assert fitted.shrinkage == SHRINKAGES[np.argmax(close)]
    weight_FK = torch.from_numpy(3 * fitted.sharpness * solved(fitted.shrinkage)[0])
    logits = (sample_SF - torch.from_numpy(means.mean(0))) @ weight_FK
    torch.testing.assert_close(fitted.log_probabilities(sample_SF), logits.log_softmax(1))
    best = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y_N))
    for factor in (0.9, 1.1):
        assert torch.nn.functional.cross_entropy(factor * logits, torch.from_numpy(y_N)) > best


@pytest.mark.parametrize(("scale", "noise"), [(0.1, 0.3), (1.0, 0.3), (1.0, 1.0), (30.0, 2.0)])
def test_scores_become_as_sharp_as_their_labels_say(scale, noise):
    rng = torch.Generator().manual_seed(0)
    y_S = torch.randint(12, (200,), generator=rng)
    score_SM = noise * torch.randn(200, 12, generator=rng, dtype=torch.float64)
    score_SM[torch.arange(200), y_S] += 1

    def loss(factor):
        return torch.nn.functional.cross_entropy(factor * scale * score_SM, y_S)

    factor = sharpness(scale * score_SM, y_S)
    assert LEAST_SHARP < factor < SHARPEST
    assert loss(factor) < min(loss(0.999 * factor), loss(1.001 * factor))


def test_the_sharpness_of_scores_has_bounds():
    y_S = torch.arange(20) % 4
    right_SM = torch.nn.functional.one_hot(y_S, 4).double()
    assert sharpness(0.001 * right_SM, y_S) == SHARPEST
    assert sharpness(-right_SM, y_S) == pytest.approx(LEAST_SHARP, rel=1e-3)


def test_one_image_of_each_class_is_enough_for_an_answer():
    mean_MD = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5)))
    for count in (1, 3):
        fitted = fit(torch.zeros(5, 5).double(), count, mean_MD[:count], mean_MD[:0],
                     torch.empty(0).long(), 2)
        assert fitted.log_probabilities(mean_MD[:count]).argmax(1).tolist() == list(range(count))
        assert torch.isfinite(fitted.strangeness(mean_MD)).all()


def test_an_image_is_strange_by_its_direction_or_by_the_trunks_density():
    rng = np.random.default_rng(0)
    y_N = torch.arange(4).repeat_interleave(100)
    mean_MD = torch.from_numpy(4 * np.eye(4, 12))
    x_ND = mean_MD[y_N] + torch.from_numpy(rng.normal(size=(400, 12)))
    centred = x_ND - mean_MD[y_N]
    fitted = fit(centred.T @ centred, 400, mean_MD, x_ND[::2], y_N[::2], 6)
    strange_N = fitted.strangeness(x_ND[1::2])
    limit = torch.quantile(strange_N, 0.95)
    beyond_D = mean_MD.mean(0) + 8 * (mean_MD[1] - mean_MD.mean(0))  # in the direction of class 1
    elsewhere_D = mean_MD.mean(0) + 4 * torch.eye(12).double()[5]
    strangers_BD = torch.stack([beyond_D, elsewhere_D])
    assert (fitted.strangeness(strangers_BD) > limit).all()
    near_B = fitted.density.distance(mean_MD[:, :12])
    assert (near_B < fitted.density.distance(strangers_BD[:1])).all()
    blind = dataclasses.replace(fitted, distances=fitted.distances._replace(mean=1e9))
    assert blind.strangeness(strangers_BD[:1]) < limit


def test_the_angle_is_taken_in_coordinates_in_which_the_covariance_is_the_identity():
    """From pieces of a triangle: as from the inverse of the whole matrix."""
    draw = torch.Generator().manual_seed(0)
    root_DD, mean_MD, h_BD = (torch.randn(size, 20, generator=draw, dtype=torch.float64)
                              for size in (20, 3, 5))
    images = 500
    fitted = fit(images * root_DD @ root_DD.T, images, mean_MD, mean_MD[:0],
                 torch.empty(0, dtype=torch.int64), 4)
    around_BD, around_MD = h_BD - mean_MD.mean(0), mean_MD - mean_MD.mean(0)
    covariance_DD = root_DD @ root_DD.T
    inverse_DD = torch.linalg.inv(covariance_DD + fitted.shrinkage * covariance_DD.diagonal().mean()
                                  * torch.eye(20))
    length_B, length_M = ((x_ND @ inverse_DD * x_ND).sum(1).sqrt() for x_ND in (around_BD,
                                                                               around_MD))
    cosine_BM = around_BD @ inverse_DD @ around_MD.T / length_B[:, None] / length_M
    torch.testing.assert_close(fitted.strangeness(h_BD) - (
        fitted.density.distance(h_BD) - 1).clamp_min(0), -cosine_BM.amax(1))
    near_B = fitted.single().strangeness(h_BD.float()).double()
    torch.testing.assert_close(near_B, fitted.strangeness(h_BD), rtol=1e-3, atol=1e-4)


def test_an_image_is_strange_to_the_head_that_answers_where_it_gives_little(learner, measured,
                                                                            tasks, weights):
    """The head's energy lies below its usual one, and counts half of what the cosine says."""
    detector, z_BCHW = detector_of(measured, (0, 1, 2)), plain(tasks[1].test)
    usual_2 = detector.slots[1]["energy"]
    logits_NK = detector.slots[1]["sharpness"] * learner.strategy.head(plain(tasks[1].validation),
                                                                       weights[1])
    torch.testing.assert_close(usual_2, torch.stack([
        logits_NK.logsumexp(1).mean(), logits_NK.logsumexp(1).std()]))
    fitted = detector._solve(range(3)).fitted
    h_BD = detector.expansion(z_BCHW)
    one_B, none_B = torch.ones(len(h_BD)), torch.full((len(h_BD),), torch.nan)
    usual_B = fitted.strangeness(h_BD, 0 * one_B)
    torch.testing.assert_close(fitted.strangeness(h_BD, 3 * one_B), usual_B + 1.5)
    assert torch.equal(fitted.strangeness(h_BD, none_B), fitted.strangeness(h_BD))
    joint, strange_B, _ = detector.infer(learner.strategy.head, range(3), weights, z_BCHW)
    rows_R = torch.nonzero(joint.task_B == 1)[:, 0]
    assert len(rows_R)
    own_RK = detector.slots[1]["sharpness"] * learner.strategy.head(z_BCHW[rows_R], weights[1])
    torch.testing.assert_close(
        strange_B[rows_R], fitted.strangeness(h_BD[rows_R], (usual_2[0] - own_RK.logsumexp(1))
                                              / usual_2[1]), rtol=1e-4, atol=1e-4)


def test_a_model_from_before_energies_answers_as_before(measured, learner, tasks, weights):
    """It has log-probabilities of the kept images and no energy: cosine and density stay alone."""
    tensors = detector_of(measured, (0, 1)).tensors()
    for slot in (0, 1):
        del tensors[f"energy.{slot}"]
        tensors[f"sample_head_SK.{slot}"] = tensors[f"sample_head_SK.{slot}"].log_softmax(1)
    old, z_BCHW = Detector.from_tensors(tensors, 2), plain(tasks[0].test)
    assert hash_tensors(old.tensors()) == hash_tensors(tensors)
    found = old.infer(learner.strategy.head, (0, 1), weights, z_BCHW)
    fitted = old._solve((0, 1)).fitted
    assert torch.equal(found.strange_B, fitted.strangeness(old.expansion(z_BCHW)))
    kept_SD = torch.cat([own["sample_SD"] for own in old.slots]).float()
    assert old.threshold((0, 1)) == pytest.approx(
        threshold_of(fitted.strangeness(kept_SD).double(), 0.05), rel=1e-3)
    new = detector_of(measured, (0, 1)).infer(learner.strategy.head, (0, 1), weights, z_BCHW)
    assert torch.equal(found.joint.task_B, new.joint.task_B)
    torch.testing.assert_close(found.joint.p_BL, new.joint.p_BL, rtol=1e-4, atol=1e-5)
    added = detector_of(measured, (0, 1, 2))
    old.add_task(measured[2])
    assert torch.isfinite(old.infer(learner.strategy.head, range(3), weights, z_BCHW).strange_B
                          ).all()
    assert torch.equal(old.scatter_P, added.scatter_P)


def opinions(rng, images, classes, clear):
    """A made-up opinion that is right as often as `clear` is large, and the classes."""
    y_S = torch.from_numpy(rng.integers(0, classes, images))
    logits = torch.from_numpy(rng.normal(size=(images, classes)))
    logits[torch.arange(images), y_S] += clear
    return logits.log_softmax(1), y_S


def test_the_better_opinion_counts_more_and_the_fit_is_the_likeliest():
    rng = np.random.default_rng(0)
    tasks = []
    for classes in (3, 5):
        head, y_S = opinions(rng, 300, classes, 3.0)
        tasks.append((head, opinions(rng, 300, classes, 0.0)[0], y_S))
    powers = fit_powers(tasks)
    assert powers.head > powers.detector + 0.5

    def loss(candidate):
        drawn = DRAWN / 2 * sum((power - POWER) ** 2 for power in candidate)
        return drawn + sum(torch.nn.functional.nll_loss(mixed(candidate, head, detector), y_S,
                                                reduction="sum")
                   for head, detector, y_S in tasks)
    for change in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
        assert loss(powers) < loss(Powers(powers.head + change[0], powers.detector + change[1]))
    assert fit_powers([]) == Powers(0.5, 0.5)


def test_heads_are_asked_only_where_they_can_change_the_answer():
    rng = np.random.default_rng(0)
    log_p_BM = torch.from_numpy(3 * rng.normal(size=(400, 12))).log_softmax(1).float()
    log_p = list(torch.split(log_p_BM, [3, 4, 5], dim=1))
    log_p_BTL = torch.stack([torch.nn.functional.pad(part, (0, 5 - part.shape[1]), value=-torch.inf)
                             for part in log_p], 1)
    heads = [torch.from_numpy(2 * rng.normal(size=part.shape)).log_softmax(1).float()
             for part in log_p]
    powers, asked = Powers(0.7, 0.4), []

    def head(task, rows_R):
        asked.append(len(rows_R))
        return heads[task][rows_R]
    joint = answer(log_p_BTL, powers, head)
    every = torch.stack([torch.nn.functional.pad(
        (part.logsumexp(1, keepdim=True) + mixed(powers, own, part - part.logsumexp(
            1, keepdim=True))), (0, 5 - part.shape[1]), value=-torch.inf)
        for part, own in zip(log_p, heads, strict=True)], 1)
    task_BT = torch.stack([part.logsumexp(1) for part in log_p], 1)
    third_B = task_BT.argmin(1)  # of three tasks, the two likeliest count
    every[torch.arange(400), third_B] = -torch.inf
    assert torch.equal(joint.task_B, every.amax(2).argmax(1))
    assert torch.equal(joint.p_BL.argmax(1), every[torch.arange(400), joint.task_B].argmax(1))
    torch.testing.assert_close(joint.p_BL.sum(1), torch.ones(400))
    torch.testing.assert_close(joint.task_p_B, torch.stack([
        log_p_BM[row, [slice(3), slice(3, 7), slice(7, 12)][task]].exp().sum()
        for row, task in enumerate(joint.task_B.tolist())]))
    assert 400 <= sum(asked) < 0.9 * 2 * 400
    every_head, usual = sum(asked), usual_top(powers, [
        (own, part - part.logsumexp(1, keepdim=True), torch.zeros(400).long())
        for part, own in zip(log_p, heads, strict=True)])
    assert math.log(1 / 5) < usual < 0
    assert usual_top(powers, []) == 0.0
    asked.clear()
    fewer = answer(log_p_BTL, powers, head, usual)
    assert 400 < sum(asked) < 0.95 * every_head
    assert (fewer.task_B == joint.task_B).float().mean() > 0.8


def test_it_finds_tasks_far_better_than_guessing_and_measures_every_task(learner, tasks):
    measured = without_task_id(learner.strategy, learner.inference,
                               [task.test for task in tasks[:3]], range(3))
    assert measured["task_accuracy"] > 0.6
    assert measured["acc"] == measured["acc_combined"] > 1 / 6
    assert learner.finished[2].without_id.items() >= measured.items()
    assert "rejection_auroc" not in learner.finished[0].without_id
    assert learner.finished[0].without_id["acc"] > 0.5
    assert "acc_entropy" not in learner.finished[1].without_id
    after = [record.without_id["acc"] for record in learner.finished]
    assert class_incremental(learner.finished) == {
        "last": after[2], "average_incremental": pytest.approx(sum(after) / 3)}
    old = [dataclasses.replace(learner.finished[0], without_id=None), *learner.finished[1:]]
    assert class_incremental(old) == {"last": after[2]}
    assert class_incremental(old[:1]) == class_incremental([]) == {}


def test_a_class_of_several_tasks_is_right_whichever_of_them_it_is_taken_for(learner, tasks):
    """As where the same classes come back in other conditions: the answer is the class's name."""
    tests = [task.test for task in tasks[:3]]

    def acc(classes):
        found = without_task_id(learner.strategy, learner.inference, tests, range(3), False,
                                classes)["acc"]
        right = right_without_task(learner.strategy, learner.inference, tests, classes)
        assert found == pytest.approx(sum(right_N.double().mean().item() for right_N in right) / 3)
        return found
    apart = acc(None)
    assert acc([("a", "b"), ("c", "d"), ("e", "f")]) == apart < 1
    assert acc([("a", "b"), ("a", "b"), ("e", "f")]) > apart
    assert acc([("a", "a")] * 3) == pytest.approx(1)


def test_strangers_are_rejected_and_known_images_are_not(learner, tasks, weights):
    known = [task.test for task in tasks[:3]]
    assert rejection_auroc(learner.strategy, learner.inference, known, tasks[4].test,
                           range(3)) > 0.6
    noise = torch.rand(40, *known[0].shape_CHW, generator=torch.Generator().manual_seed(0))
    inside, outside = (learner.inference.infer(learner.strategy.head, range(3), weights, z_BCHW)
                       for z_BCHW in (torch.cat([plain(each) for each in known]), noise))
    assert inside.known_B.float().mean() > 0.7
    assert auroc(inside.strange_B, outside.strange_B) > 0.8


def test_more_false_alarms_lower_the_threshold(measured):
    detector = detector_of(measured, (0, 1, 2))
    usual = detector.threshold(range(3))
    many = Detector(FEATURES, false_alarms=0.5)
    for task in range(3):
        many.add_task(measured[task])
    assert many.threshold(range(3)) < usual


@pytest.mark.parametrize("images", [20, 60])
def test_few_images_give_the_same_classifier_by_a_smaller_eigenproblem(images, monkeypatch):
    draw = torch.Generator().manual_seed(images)
    x_ND = torch.randn(images, 200, generator=draw).double() @ torch.logspace(0, -2, 200).diag(
        ).double()
    y_N = torch.arange(images) % 5
    mean_MD = torch.stack([x_ND[y_N == label].mean(0) for label in range(5)])
    scatter_DD = torch.round((x_ND - mean_MD[y_N]).T @ (x_ND - mean_MD[y_N]) / UNIT) * UNIT
    values_R, vectors_DR = spectrum(scatter_DD, images)
    assert vectors_DR.shape[1] < 100
    torch.testing.assert_close(vectors_DR * values_R @ vectors_DR.T, scatter_DD, atol=1e-3, rtol=0)
    found = fit(scatter_DD, images, mean_MD, x_ND, y_N, 40)
    monkeypatch.setattr(fitted, "SPARE", 200)
    whole = fit(scatter_DD, images, mean_MD, x_ND, y_N, 40)
    assert found.shrinkage == whole.shrinkage
    torch.testing.assert_close(found.weight_MD, whole.weight_MD, rtol=1e-4, atol=1e-4)


def test_fewer_images_than_features_choose_a_shrinkage_that_rounding_does_not_decide():
    """Two classes that a fit without shrinkage reproduces: its error is a quotient of roundings."""
    draw = torch.Generator().manual_seed(0)
    x_ND = 0.2 * torch.randn(54, 660, generator=draw).double()
    y_N = torch.arange(54) % 2
    x_ND[y_N == 1, :20] += 0.5
    mean_MD = torch.stack([x_ND[y_N == label].mean(0).half().double() for label in range(2)])
    scatter_DD = torch.round((x_ND - mean_MD[y_N]).T @ (x_ND - mean_MD[y_N]) / UNIT) * UNIT
    solved = fit(scatter_DD, 54, mean_MD, x_ND[:12], y_N[:12], 160)
    assert SHRINKAGES[0] < solved.shrinkage
    new_ND = 0.2 * torch.randn(200, 660, generator=draw).double()
    new_ND[100:, :20] += 0.5
    right = solved.log_probabilities(new_ND).argmax(1) == torch.arange(200) // 100
    assert right.double().mean() > 0.9


@pytest.mark.parametrize("kept", [19, 60, 400])
def test_another_known_image_is_beyond_the_threshold_as_often_as_asked(kept):
    draws = torch.randn(4000, kept + 1, generator=torch.Generator().manual_seed(kept)).double()
    beyond = [bool(row[-1] > threshold_of(row[:-1], 0.05)) for row in draws]
    assert sum(beyond) / len(beyond) == pytest.approx(0.05, abs=0.01)


def test_few_kept_images_cannot_promise_rare_alarms():
    kept = torch.tensor([0.0, 3.0, 1.0]).double()
    assert threshold_of(kept, 0.05) == 3.0
    assert threshold_of(kept, 0.5) == 1.0
    assert threshold_of(kept[:0], 0.05) == math.inf


def test_a_saved_model_infers_the_same(cut, config, learner, tasks, tmp_path):
    model = Model(config, cut.trunk, learner.strategy, INFOS, inference=learner.inference)
    model.save(tmp_path / "model")
    z_BCHW = plain(tasks[1].test)
    before = Predictor(model).answers(z_BCHW, ["auto"] * len(z_BCHW))
    after = Predictor.load(tmp_path / "model").answers(z_BCHW, ["auto"] * len(z_BCHW))
    assert before == after
    assert {answer.task for answer in after} <= {"a", "b", "c"}
    assert all(abs(sum(answer.probabilities) - 1) < 1e-5 for answer in after)
    assert all(0 < answer.task_probability <= 1 for answer in after)
    mixed_up = Predictor(model).answers(z_BCHW[:4], ["auto", "b", "auto", "a"])
    assert mixed_up[0].probabilities == pytest.approx(before[0].probabilities, abs=1e-6)
    assert mixed_up[0].task_probability == pytest.approx(before[0].task_probability, abs=1e-5)
    assert [answer.task for answer in mixed_up[::3]] == [before[0].task, "a"]
    assert mixed_up[1].task == "b"
    assert [answer.task_probability is None for answer in mixed_up] == [False, True, False, True]


def test_an_interrupted_stream_ends_with_the_same_statistics(cut, tasks, config, learner):
    first = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train,
                    inference=Detector(FEATURES))
    list(first.learn(tasks[:2]))
    second = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train,
                     inference=Detector(FEATURES))
    second.restore(*first.state())
    list(second.learn(tasks[:3]))
    for name, value in learner.inference.tensors().items():
        assert torch.equal(second.inference.tensors()[name], value), name


def test_a_task_adds_its_means_and_samples_and_nothing_else(measured):
    def size(detector):
        return sum(v.numel() * v.element_size() for v in detector.tensors().values())
    detector = detector_of(measured, (0, 1, 2))
    before = size(detector)
    detector.add_task(measured[3])
    assert size(detector) - before == detector.task_bytes(3)


@pytest.mark.parametrize("change", [
    {"scatter": None}, {"expansion": torch.tensor([0, 1, 2])}, {"mean_KD.1": torch.zeros(2, 3)},
    {"sample_y_S.0": None}, {"scatter": torch.zeros(4, dtype=torch.int32)}])
def test_damaged_statistics_are_refused(measured, change):
    tensors = detector_of(measured, (0, 1)).tensors()
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    with pytest.raises(IntegrityError, match="detector of this checkpoint does not fit"):
        Detector.from_tensors(tensors, 2)


def test_nothing_is_inferred_before_the_first_task():
    with pytest.raises(InputError, match="no task is learned yet"):
        Detector().classify((), torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize(("length", "count", "places"), [
    (10, 5, [1, 3, 5, 7, 9]), (3, 5, [0, 1, 2]), (0, 4, [])])
def test_rows_are_spread_evenly(length, count, places):
    assert spread_over(length, count).tolist() == places


def test_statistics_travel_as_tensors(measured):
    assert TaskStatistics(**measured[0]._asdict()).images is measured[0].images


def test_where_tasks_start_from_the_network_its_own_head_is_seen_too(cut, network, config, tasks,
                                                                     tmp_path):
    """Pooled features of the network's later blocks, from the stored features of the cut."""
    config = dataclasses.replace(config, hypernet=dataclasses.replace(
        config.hypernet, starts_from="network"))
    learner = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train,
                      inference=Detector(FEATURES))
    list(learner.learn(tasks[:2]))
    detector, z_BCHW = learner.inference, plain(tasks[0].test)
    blocks = CutNetwork.of(network, 3).stages
    later = learner.strategy.reference_features(z_BCHW, detector.reference_norm)
    expected = z_BCHW
    for block, found_BF in zip(blocks, later, strict=True):
        expected = block(expected)
        torch.testing.assert_close(found_BF, expected.mean((2, 3)), rtol=1e-4, atol=1e-4)
    (last_BF,) = learner.strategy.reference_features(z_BCHW, detector.reference_norm, (-1,))
    assert torch.equal(last_BF, later[-1])
    C, widths = z_BCHW.shape[1], tuple(found_BF.shape[1] for found_BF in later)
    assert detector.expansion.widths == widths
    assert detector.expansion.width == 2 * C + sum(widths) + FEATURES
    Model(config, cut.trunk, learner.strategy, INFOS[:2], inference=detector).save(tmp_path / "m")
    loaded = Model.load(tmp_path / "m").inference
    same_answers(loaded, (0, 1), detector, (0, 1), learner,
                 [learner.strategy.weights(task) for task in range(2)], z_BCHW)
    never = Detector(FEATURES)
    never.see(STRATEGIES["partial_hn"](cut.head, cut.start, config).eval())
    never.add_task(never.statistics(tasks[1].train, tasks[1].validation, 2))
    detector.forget([0], tasks[0].train)
    assert torch.equal(detector.scatter_P, never.scatter_P)
    earlier = Detector(FEATURES)  # as detectors were begun that saw the last block alone
    earlier.expansion = Expansion.from_tensor(torch.tensor([C, 1, FEATURES, widths[-1]]))
    earlier.reference_norm = never.reference_norm
    earlier.see(learner.strategy)
    assert earlier.expansion.tensor().tolist() == [C, 1, FEATURES, widths[-1]]
    h_BD = earlier.expansion(z_BCHW)
    assert torch.equal(h_BD[:, :2 * C], detector.expansion(z_BCHW)[:, :2 * C])
    torch.testing.assert_close(h_BD[:, 2 * C:-FEATURES], scaled(last_BF))


@pytest.mark.parametrize(("widths", "blocks"), [
    ((), ()), ((192, 192, 192, 192, 320, 1280), (0, 1, 2, 3, 4)), ((2048, 2048, 2048), (2,)),
    ((SEEN // 4,) * 8, (0, 2, 4, 7)), ((64,) * 3, (0, 1, 2))])
def test_blocks_are_seen_as_far_as_their_channels_fit(widths, blocks):
    assert seen_blocks(widths) == blocks


def test_spreads_of_the_networks_later_blocks_are_seen_in_place_of_random_features(network, config,
                                                                                   images):
    """Not those of its last block; and they come back from a checkpoint's numbers."""
    config = dataclasses.replace(
        config, hypernet=dataclasses.replace(config.hypernet, starts_from="network"),
        backbone=dataclasses.replace(config.backbone, freeze_depth=1))
    cut = cut_network(config, network)
    strategy, detector = STRATEGIES["partial_hn"](cut.head, cut.start, config).eval(), Detector()
    detector.see(strategy)
    z_BCHW = run_trunk(cut.trunk, images[:6])
    few, many = (expansion_of(z_BCHW.shape[1:], count, detector._embed) for count in (16, 500))
    widths = tuple(block.shape[1] for block in strategy.reference_features(
        z_BCHW, detector.reference_norm))
    assert len(widths) == 3
    assert (few.blocks, few.spreads, few.widths) == ((0, 1, 2), (0, 1), widths + widths[:2])
    assert (few.features, many.features) == (0, 500 - sum(widths[:2]))
    maps, expected = z_BCHW, []
    for block in list(CutNetwork.of(network, 1).stages)[:2]:
        maps = block(maps)
        expected.append(scaled(maps.flatten(2).std(2, correction=0)))
    h_BD = many(z_BCHW)
    assert h_BD.shape == (6, many.width)
    found_BS = h_BD[:, many.own + sum(widths):many.width - many.features]
    torch.testing.assert_close(found_BS, torch.cat(expected, 1), rtol=1e-3, atol=1e-3)
    assert torch.equal(h_BD[:, :many.width - many.features], few(z_BCHW))
    again = Expansion.from_tensor(many.tensor(), detector._embed)
    assert again == many
    assert torch.equal(again(z_BCHW), h_BD)
    single = expansion_of((*z_BCHW.shape[1:2], 1, 1), 16, detector._embed)
    assert (single.spreads, single.features) == ((), 16)
