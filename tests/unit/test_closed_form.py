"""Ridge regression and nearest class mean: against scikit-learn, and as strategies in the loop."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import NearestCentroid

from partialhn.features.closed_form import (
    PENALTIES,
    SHRUNK,
    Ridge,
    accuracy,
    fit_class_means,
    fit_ridge,
    one_hot,
    pooled_cells,
    sharpness,
)
from partialhn.predict import Predictor
from partialhn.run import run_stream
from partialhn.strategies import STRATEGIES
from partialhn.training.learner import Learner
from partialhn.training.records import EpochRecord

NAMES = ("ridge", "ncm")


def clusters(images, features, seed=0, spread=1.5):
    """Three clusters of numbers that overlap a little."""
    rng = np.random.default_rng(seed)
    y_N = np.arange(images) % 3
    centre_KF = np.random.default_rng(9).normal(size=(3, features))
    x_NF = centre_KF[y_N] + spread * rng.normal(size=(images, features)) + 5
    return torch.tensor(x_NF), torch.tensor(y_N)


@pytest.mark.parametrize("features", [4, 50])
def test_ridge_is_that_of_scikit_learn_with_fewer_and_with_more_features_than_images(features):
    x_NF, y_N = clusters(30, features)
    centred_NF = x_NF - x_NF.mean(0)
    ridge = Ridge(centred_NF, y_N, 3)
    known = SklearnRidge(alpha=2.5).fit(centred_NF.numpy(), one_hot(y_N, 3).numpy())
    np.testing.assert_allclose(ridge.weight(2.5).numpy(), known.coef_.T, atol=1e-8)
    np.testing.assert_allclose(ridge.bias_K.numpy(), known.intercept_, atol=1e-8)


@pytest.mark.parametrize(("images", "features", "strength"),
                         [(30, 4, 2.5), (30, 50, 2.5), (10, 3000, 1e-3), (28, 3000, 2.8e-3)])
def test_left_out_predictions_are_those_of_fits_without_the_image(images, features, strength):
    """With many features and the least penalty a fit leaves a ten-millionth of each image."""
    x_NF, y_N = clusters(images, features, spread=1.0)
    ridge, target_NK = Ridge(x_NF - x_NF.mean(0), y_N, 3), one_hot(y_N, 3).numpy()
    for index in (0, 7, images - 1):
        others = np.delete(np.arange(images), index)
        known = SklearnRidge(alpha=strength).fit(x_NF[others].numpy(), target_NK[others])
        np.testing.assert_allclose(ridge.left_out(strength)[index].numpy(),
                                   known.predict(x_NF[index:index + 1].numpy())[0],
                                   atol=1e-8 if features < 3000 else 1e-6)


def test_important_features_are_penalised_less():
    """As those are that are measured in a smaller unit, where nothing is standardised."""
    x_NF, y_N = clusters(30, 40)
    importance_F = torch.where(torch.arange(40) < 10, 3.0, 1.0).double()
    found = fit_ridge(x_NF, y_N, 3, importance_F)
    variance_F = x_NF.var(0, correction=0)
    scaled_NF = (x_NF - x_NF.mean(0)) * importance_F / (
        variance_F + SHRUNK * variance_F.mean()).sqrt()
    ridge = Ridge(scaled_NF, y_N, 3)
    strength = min((30 * penalty for penalty in PENALTIES), key=ridge.leave_one_out)
    torch.testing.assert_close(found.left_out_NK, ridge.left_out(strength))
    torch.testing.assert_close(found.logits(x_NF), scaled_NF @ ridge.weight(strength)
                               + ridge.bias_K)
    plain = fit_ridge(x_NF, y_N, 3)
    assert (found.logits(x_NF) - plain.logits(x_NF)).abs().max() > 1e-3


def test_a_feature_that_few_images_hardly_show_does_not_decide():
    """Most features of a network are zero for most images. Divided by the little that ten images
    show of them, they would drown the others where they are not zero.
    """
    rng = np.random.default_rng(0)

    def drawn(images):
        y_N = np.arange(images) % 2
        known_NF = rng.normal(size=(images, 20)) + 1.5 * y_N[:, None]
        rare_NF = 3 * rng.exponential(size=(images, 400)) * (rng.random((images, 400)) < 0.1)
        rare_NF = rare_NF if images > 10 else rare_NF * 1e-3
        return torch.tensor(np.concatenate([known_NF, rare_NF], 1)), torch.tensor(y_N)
    x_NF, y_N = drawn(10)
    test_NF, y_M = drawn(1000)
    assert accuracy(fit_ridge(x_NF, y_N, 2).logits(test_NF), y_M) > 0.8


def test_few_images_of_noise_are_not_known():
    rng, y_N = np.random.default_rng(0), torch.arange(12) % 3
    right = [accuracy(fit_ridge(torch.tensor(rng.normal(size=(12, 3000))), y_N, 3).left_out_NK, y_N)
             for _ in range(20)]
    assert np.mean(right) < 0.5  # a third would be chance; the images themselves would be all right


def test_class_means_answer_as_scikit_learns_nearest_centroid():
    x_NF, y_N = clusters(60, 5)
    known = NearestCentroid().fit(x_NF.numpy(), y_N.numpy())
    fitted, (test_NF, _) = fit_class_means(x_NF, y_N, 3), clusters(200, 5, seed=1)
    assert fitted.logits(test_NF).argmax(1).tolist() == known.predict(test_NF.numpy()).tolist()
    # the same distances without an image: its class mean is that of the others of its class
    others = torch.arange(60) != 6
    left = fit_class_means(x_NF[others], y_N[others], 3).logits(x_NF[6:7])[0]
    ours = fitted.left_out_NK[6]
    torch.testing.assert_close(ours - ours.mean(), left - left.mean())


@pytest.mark.parametrize("fit", [fit_ridge, fit_class_means])
def test_probabilities_are_about_as_sure_as_they_are_right(fit):
    """Mean probability of the answer against accuracy, on 3,000 new images of 120 seen ones."""
    x_NF, y_N = clusters(120, 8, spread=2.5)
    test_NF, test_N = clusters(3000, 8, seed=1, spread=2.5)
    p_NK = fit(x_NF, y_N, 3).sharpened(y_N).logits(test_NF).softmax(1)
    right = float((p_NK.argmax(1) == test_N).double().mean())
    assert 0.6 < right < 0.98
    assert float(p_NK.max(1).values.mean()) == pytest.approx(right, abs=0.06)


def test_a_classifier_without_an_error_is_not_infinitely_sure():
    y_N = torch.arange(30) % 3
    perfect_NK = one_hot(y_N, 3).double()
    sure = (sharpness(perfect_NK, y_N) * perfect_NK).softmax(1).max(1).values
    assert float(sure.mean()) == pytest.approx(11 / 12, abs=1e-3)  # (n + 1) / (n + 2), n = 10
    assert sharpness(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0


@pytest.mark.parametrize("fit", [fit_ridge, fit_class_means])
def test_one_image_a_class_constant_features_and_a_class_without_images(fit):
    x_NF = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    fitted = fit(x_NF, torch.tensor([0, 1]), 3).sharpened(torch.tensor([0, 1]))
    assert torch.isfinite(fitted.logits(x_NF.double())).all()
    assert fitted.logits(x_NF.double()).argmax(1).tolist() == [0, 1]


@pytest.fixture
def learner(cut, with_options):
    def new(name, **options):
        config = with_options(train={"strategy": name, **options})
        return Learner(STRATEGIES[name](cut.head, cut.start, config), config.train)
    return new


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_one_record_without_steps_and_epochs_change_nothing(learner, tasks, name):
    one, other = learner(name), learner(name, epochs=7, learning_rate=0.5, seed=3)
    records = list(one.learn(tasks[:2]))
    list(other.learn(tasks[:2]))
    epochs = [record for record in records if isinstance(record, EpochRecord)]
    assert [(record.epoch, record.epochs, record.regulariser) for record in epochs] == [
        (1, 1, 0.0)] * 2
    assert all(record.accuracy > 0.7 and record.validation_accuracy is not None
               for record in epochs)
    for task in range(2):
        assert torch.equal(one.strategy.weights(task).classifier_KF,
                           other.strategy.weights(task).classifier_KF)


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_those_of_the_closed_form(learner, tasks, name):
    learned = learner(name)
    list(learned.learn(tasks[:2]))
    fit = fit_ridge if name == "ridge" else fit_class_means
    x_NF, test_NF = (pooled_cells(features, 1).double()
                     for features in (tasks[1].train, tasks[1].test))
    fitted = fit(x_NF, tasks[1].train.y_N, 2).sharpened(tasks[1].train.y_N)
    rows = torch.arange(len(tasks[1].test))
    with torch.no_grad():
        logits = learned.strategy(tasks[1].test.gather(rows, torch.zeros_like(rows)), 1)
    torch.testing.assert_close(logits, fitted.logits(test_NF).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_from_before_the_task_is_measured_goes_on(learner, tasks, name):
    whole, begun, again = learner(name), learner(name), learner(name)
    list(whole.learn(tasks[:2]))
    steps = begun.learn(tasks[:2])
    for _ in range(3):  # the first task, and the second one's only epoch
        next(steps)
    again.restore(*begun.state())
    assert [type(record).__name__ for record in again.learn(tasks[:2])] == ["TaskRecord"]
    assert [record.accuracy_row for record in again.finished] == [
        record.accuracy_row for record in whole.finished]


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_stream_is_stored_found_and_predicted_from(config, tmp_path, name, digits):
    own = dataclasses.replace(config, backbone=dataclasses.replace(
        config.backbone, freeze_depth=4), train=dataclasses.replace(config.train, strategy=name))
    whole, again = run_stream(own, tmp_path), run_stream(own, tmp_path)
    assert again.model.weights_hash() == whole.model.weights_hash()
    assert whole.fields["acc"] > 0.6
    predicted = Predictor(again.model).predict(digits[0].test.take(range(4)).read(), "0")
    np.testing.assert_allclose(predicted.probabilities_BK.sum(1), 1, rtol=1e-5)
