"""Task inference of models of version 0.1.0, which new versions still read and continue."""

import dataclasses

import numpy as np
import pytest
import torch

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.detector.detector import Detector
from partialhn.errors import InputError, IntegrityError
from partialhn.evaluation.task_inference_metrics import auroc, rejection_auroc, without_task_id
from partialhn.predict import Predictor
from partialhn.strategies import STRATEGIES
from partialhn.task_inference import (
    METHODS,
    SAMPLE,
    SHRINKAGE,
    TaskInference,
    best_task,
    contenders,
    entropies,
    infer,
    pooled,
    scores,
    statistics,
)
from partialhn.training.learner import Learner

INFOS = tuple(TaskInfo(name, (f"{name}-0", f"{name}-1")) for name in ("a", "b", "c"))


def plain(features):
    rows = torch.arange(len(features))
    return features.gather(rows, torch.zeros_like(rows))


@pytest.fixture(scope="module")
def learner(cut, tasks, config):
    made = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train)
    made.inference = TaskInference()
    list(made.learn(tasks[:3]))
    return made


@pytest.fixture(scope="module")
def inference(learner):
    return learner.inference


def test_distances_are_those_of_class_means_and_one_covariance(inference, tasks):
    means, centred = [], []
    for task in tasks[:3]:
        z_NC = pooled(plain(task.train)).double().numpy()
        y_N = task.train.y_N.numpy()
        own = np.stack([z_NC[y_N == label].mean(0) for label in np.unique(y_N)])
        means.append(own.astype(np.float16).astype(np.float64))
        centred.append(z_NC - own[y_N])
    rows = np.concatenate(centred)
    covariance = rows.T @ rows / len(rows)
    covariance = ((1 - SHRINKAGE) * covariance + SHRINKAGE * np.diag(covariance).mean()
                  * np.eye(len(covariance)))
    inverse = np.linalg.inv(covariance)
    z_BC = pooled(plain(tasks[1].test)).double().numpy()
    expected = np.stack([np.min([np.einsum("bc,cd,bd->b", z_BC - mean, inverse, z_BC - mean)
                                 for mean in own], axis=0) for own in means], axis=1)
    np.testing.assert_allclose(inference.distances(torch.from_numpy(z_BC)), expected, rtol=1e-3)


def test_the_order_of_tasks_does_not_change_the_covariance(tasks, inference):
    other = TaskInference()
    for task in (tasks[2], tasks[0], tasks[1]):
        other.add_task(statistics(task.train, 0))
    torch.testing.assert_close(other.scatter_CC, inference.scatter_CC, rtol=1e-4, atol=1e-5)


def test_a_task_adds_its_means_and_its_sample_and_nothing_else(tasks, inference):
    C = tasks[0].train.shape_CHW[0]
    before = sum(v.numel() * v.element_size() for v in inference.tensors().values())
    grown = TaskInference.from_tensors(inference.tensors(), 3)
    grown.add_task(statistics(tasks[3].train, 3))
    after = sum(v.numel() * v.element_size() for v in grown.tensors().values())
    assert after - before == grown.task_bytes(3) == 2 * C * (2 + SAMPLE)


def test_a_task_without_images_of_a_class(tasks):
    features = tasks[0].train
    odd = dataclasses.replace(features, y_N=torch.full_like(features.y_N, 1))
    found = TaskInference()
    found.add_task(statistics(odd, 0))
    assert found.means[0].shape[0] == 1
    assert torch.isfinite(found.distances(pooled(plain(features)))).all()


def test_entropy_is_a_share_and_a_single_class_says_nothing(learner, tasks):
    strategy = learner.strategy
    weights = [strategy.weights(task) for task in range(3)]
    single = weights[0]._replace(classifier_KF=weights[0].classifier_KF[:1],
                                 bias_K=weights[0].bias_K[:1])
    with torch.no_grad():
        entropy_BT = entropies(strategy.head, [*weights, single], plain(tasks[0].test))
        p_BK = strategy.head(plain(tasks[0].test), weights[1]).softmax(1)
    assert ((entropy_BT >= 0) & (entropy_BT <= 1 + 1e-6)).all()
    expected_B = -(p_BK * p_BK.log()).sum(1) / np.log(2)
    torch.testing.assert_close(entropy_BT[:, 1], expected_B, rtol=1e-4, atol=1e-5)
    assert (entropy_BT[:, 3] == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_scores_prefer_the_near_and_the_certain(method):
    distances_BT = torch.tensor([[1.0, 9.0], [9.0, 1.0]])
    entropy_BT = torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    assert scores(method, distances_BT, entropy_BT).argmax(1).tolist() == [0, 1]


def test_heads_are_asked_only_where_that_changes_the_answer(learner, tasks):
    """The answer is that of asking all of them."""
    strategy, inference = learner.strategy, learner.inference
    weights = [strategy.weights(task) for task in range(3)]
    z_BCHW = torch.cat([plain(task.test) for task in tasks])
    with torch.no_grad():
        distances_BT = inference.distances(pooled(z_BCHW)) / 10  # closer than these tasks are
        run_BT = contenders(distances_BT)
        every_B = scores("combined", distances_BT,
                         entropies(strategy.head, weights, z_BCHW)).argmax(1)
        found_B = best_task("combined", distances_BT, strategy.head, weights, z_BCHW)
    assert 0 < run_BT.sum() < 0.75 * run_BT.numel()
    assert (run_BT.sum(1) != 1).all(), "a single contender has won without its head"
    assert (found_B != distances_BT.argmin(1)).any(), "heads do change some answers"
    assert found_B.tolist() == every_B.tolist()


def test_it_finds_tasks_far_better_than_guessing(learner, tasks):
    measured = without_task_id(learner.strategy, learner.inference,
                               [task.test for task in tasks[:3]], range(3))
    assert measured["task_accuracy"] > 0.6
    assert measured["acc"] <= measured["acc_given"]
    assert learner.finished[2].without_id.items() >= measured.items()
    assert "rejection_auroc" not in learner.finished[0].without_id
    assert {"rejection_auroc", "acc", "acc_detector"} <= learner.finished[1].without_id.keys()


def test_strangers_lie_further_off(learner, inference, tasks):
    known = [task.test for task in tasks[:3]]
    assert rejection_auroc(learner.strategy, inference, known, tasks[4].test, range(3)) > 0.6
    nearest_B = inference.distances(pooled(plain(tasks[0].train))).amin(1)
    assert (nearest_B <= inference.threshold).float().mean() > 0.8
    noise_BC = 5 + 10 * torch.rand(20, inference.means[0].shape[1])
    assert (inference.distances(noise_BC).amin(1) > inference.threshold).all()


def test_a_task_that_was_learned_again_answers_by_its_newest_place(learner, tasks):
    strategy = learner.strategy
    with torch.no_grad():
        found = infer(learner.inference, strategy.head, [1, 2],
                      [strategy.weights(1), strategy.weights(2)], plain(tasks[0].test))
    assert set(found.slot_B.tolist()) <= {1, 2}


def test_a_stream_that_began_with_it_goes_on_with_it(cut, tasks, config, learner):
    first = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train)
    first.inference = TaskInference()
    list(first.learn(tasks[:2]))
    second = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train,
                     inference=Detector())
    second.restore(*first.state())
    list(second.learn(tasks[:3]))
    assert isinstance(second.inference, TaskInference)
    for name, value in learner.inference.tensors().items():
        assert torch.equal(second.inference.tensors()[name], value), name


def test_a_saved_model_infers_the_same(cut, config, learner, tasks, tmp_path):
    model = Model(config, cut.trunk, learner.strategy, INFOS, inference=learner.inference)
    model.save(tmp_path / "model")
    z_BCHW = plain(tasks[1].test)
    before = Predictor(model).answers(z_BCHW, ["auto"] * len(z_BCHW))
    after = Predictor.load(tmp_path / "model").answers(z_BCHW, ["auto"] * len(z_BCHW))
    assert before == after
    assert {answer.task for answer in after} <= {"a", "b", "c"}


def test_a_model_made_without_it_says_so(cut, config, learner, tmp_path):
    Model(config, cut.trunk, learner.strategy, INFOS).save(tmp_path / "model")
    predictor = Predictor.load(tmp_path / "model")
    with pytest.raises(InputError, match="task is 'auto', but this model was trained without"):
        predictor.predict_auto([b"x"])


def test_statistics_of_another_number_of_tasks_are_damage(inference):
    with pytest.raises(IntegrityError, match=r"has no tensor 'means\.3'"):
        TaskInference.from_tensors(inference.tensors(), 4)


def test_nothing_is_inferred_before_the_first_task():
    with pytest.raises(InputError, match="no task is learned yet"):
        TaskInference().distances(torch.zeros(1, 3))


def test_auroc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    for low, high in ((300, 200), (1, 5), (50, 1)):
        low_N, high_N = (torch.from_numpy(rng.integers(0, 20, count) + shift).float()
                         for count, shift in ((low, 0), (high, 3)))  # many are equal
        wanted = roc_auc_score([0] * low + [1] * high, torch.cat([low_N, high_N]).numpy())
        assert auroc(low_N, high_N) == pytest.approx(wanted, abs=1e-12)
