"""The linear probe against scikit-learn's ridge classifier, and on what is and is not linear."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from partialhn.evaluation.linear_probe import linear_probe, pooled


def features_of(tasks, z_NVCHW, y_N):
    whole = tasks[0].train
    manifest = dataclasses.replace(whole.manifest, shape_VCHW=tuple(z_NVCHW.shape[1:]))
    return dataclasses.replace(whole, manifest=manifest, shards=[z_NVCHW], y_N=y_N,
                               ids=[str(i) for i in range(len(y_N))])


def clusters(rows, seed, separable=True):
    rng = np.random.default_rng(seed)
    y_N = rng.integers(0, 3, rows)
    z_NVCHW = rng.normal(size=(rows, 2, 6, 2, 2))
    if separable:
        z_NVCHW[np.arange(rows), :, y_N] += 4
    return torch.tensor(z_NVCHW, dtype=torch.float32), torch.tensor(y_N)


def test_separable_classes_are_told_apart_and_noise_is_not(tasks):
    train, test = (features_of(tasks, *clusters(300, seed)) for seed in (0, 1))
    assert linear_probe(train, test, 3) > 0.97
    noise = [features_of(tasks, *clusters(300, seed, separable=False)) for seed in (0, 1)]
    assert linear_probe(*noise, 3) == pytest.approx(1 / 3, abs=0.1)


def test_close_to_scikit_learn_on_real_digits(tasks):
    for task in tasks:
        model = RidgeClassifier(alpha=10.0)
        train_NF, test_NF = pooled(task.train).numpy(), pooled(task.test).numpy()
        mean, scale = train_NF.mean(0), train_NF.std(0).clip(1e-6)
        model.fit((train_NF - mean) / scale, task.train.y_N)
        wanted = model.score((test_NF - mean) / scale, task.test.y_N)
        found = linear_probe(task.train, task.test, task.classes)
        assert found == pytest.approx(wanted, abs=0.1), task.name
        assert found == linear_probe(task.train, task.test, task.classes)


def test_few_rows_and_a_constant_feature(tasks):
    z_NVCHW = torch.zeros(2, 1, 4, 1, 1)
    z_NVCHW[1, :, 0] = 1
    both = features_of(tasks, z_NVCHW, torch.tensor([0, 1]))
    assert linear_probe(both, both, 2) == 1.0
