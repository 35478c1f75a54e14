"""The test for drift on real images: quiet on the same ones, loud on changed ones."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from partialhn.config import DataConfig
from partialhn.data.datasets import open_stream
from partialhn.data.decode import decode
from partialhn.data.layout import read_sets
from partialhn.task_inference import pooled
from pipelines.serving import drift
from pipelines.serving.drift import DriftReport, TaskDrift, shift, table
from pipelines.serving.live import Live

DATA = os.environ.get("PARTIALHN_TEST_DATA")
ALPHA = 0.05


def features(cut, images, size, transform):
    """Pooled trunk features of a table's images."""
    decoded = decode(images, size, transform)
    with torch.no_grad():
        return torch.cat([pooled(cut.trunk(chunk))
                          for chunk in decoded.images_BCHW.split(256)]).numpy()


@pytest.fixture(scope="module", params=["digits", "photographs"])
def pool(request, cut, tmp_path_factory):
    """Real images of one kind, and a function that gives their features under a corruption."""
    if request.param == "digits":
        folder = tmp_path_factory.mktemp("digits")
        table_N, size = open_stream(DataConfig(tasks=1), folder)[0].train, 16
    else:
        image_sets = request.getfixturevalue("image_sets")
        table_N, size = read_sets(str(image_sets / "cifar10")).test, 32
    images = table_N.take(np.arange(900))
    return lambda transform="none": features(cut, images, size, transform)


def test_the_same_images_rarely_alarm(pool):
    z_NC = pool()
    alarms = 0
    for seed in range(200):
        order_N = np.random.default_rng(seed).permutation(len(z_NC))
        p_value, effect = shift(z_NC[order_N[:450]], z_NC[order_N[450:650]])
        assert 0 <= effect <= 1
        alarms += p_value < ALPHA
    # 3 standard errors above alpha; Bonferroni over dependent components may stay below it
    assert alarms / 200 <= ALPHA + 3 * (ALPHA * (1 - ALPHA) / 200) ** 0.5
    assert alarms > 0, "a test that never alarms tests nothing"


@pytest.mark.parametrize("transform", ["blur", "noise", "grey+blur+autocontrast"])
def test_corrupted_images_alarm(pool, transform):
    plain, changed = pool(), pool(transform)
    order_N = np.random.default_rng(0).permutation(len(plain))
    p_value, _ = shift(plain[order_N[:450]], changed[order_N[450:650]])
    same, _ = shift(plain[order_N[:450]], plain[order_N[450:650]])
    assert p_value < 0.002 < same


def test_constant_features_are_no_drift():
    assert shift(np.ones((50, 4)), np.ones((40, 4)))[0] == 1


def test_the_table_tells_which_task():
    report = DriftReport("models:/s/3", 24, 0.01, (
        TaskDrift("cats", 900, 512, 600, 1.2e-9, 0.41, True),
        TaskDrift("dogs", 80, 80, 600, 0.7, 0.08, False),
        TaskDrift("hats", 3, 3, 600, None, None, False)), 7, examples=("x.png", "y.png"))
    lines = table(report)
    assert "DRIFTS" in lines[2]
    assert "1.2e-09" in lines[2]
    assert lines[3].endswith("same")
    assert "too few" in lines[4]
    assert lines[5].endswith("7 images sent with task auto (0.7 % of all) seemed to belong to no "
                             "known task, for example x.png, y.png")
    assert report.drifts
    assert report.fields()["tasks"][0]["task"] == "cats"
    assert not report.new_task
    assert len(lines) == 6


def test_many_images_of_no_known_task_are_a_new_task():
    cats = TaskDrift("cats", 60, 60, 600, 0.7, 0.08, False)
    report = DriftReport("models:/s/3", 24, 0.01, (cats,), unknown=40)
    assert report.unknown_share == 0.4
    assert report.fields()["new_task"]
    assert "they are more than 20.0 %, so they may be images of a new task" in table(report)[-1]
    assert not DriftReport("models:/s/3", 24, 0.01, (cats,), 40, new_task_share=0.5).new_task
    few = TaskDrift("cats", 5, 5, 600, None, None, False)
    assert not DriftReport("models:/s/3", 24, 0.01, (few,), unknown=29).new_task, "too few to say"


def test_images_of_a_task_that_the_version_does_not_know_are_said(monkeypatch):
    """After a rollback a report without them would look as if all were well."""
    def live(seen):
        return Live(np.zeros((4, 2), np.float32), seen)

    champion = SimpleNamespace(uri="models:/s/2", tags={"trunk_fingerprint": "t"})
    monkeypatch.setattr(drift, "connect", lambda *_, **__: SimpleNamespace(
        resolve=lambda _: champion))
    monkeypatch.setattr(drift, "_task_versions", lambda *_: {"cats": champion})
    monkeypatch.setattr(drift, "read_live", lambda *_: {
        "cats": live(4), "dogs": live(50), "none": live(6)})
    monkeypatch.setattr(drift, "_compare", lambda task, _, sample, __: TaskDrift(
        task, sample.seen, 4, 600, None, None, False))
    report = drift.find_drift("s", "store")
    assert report.not_compared == (("dogs", 50),)
    assert report.fields()["not_compared"] == {"dogs": 50}
    assert "50 images of task 'dogs' not compared: models:/s/2 does not know this task" in (
        table(report))
    assert report.unknown_share == 0.1, "of all images, also those that are not compared"


def test_long_names_of_tasks_are_told_apart():
    names = ["a-camera-at-the-northern-gate", "a-camera-at-the-northern-door"]
    lines = table(DriftReport("models:/s/3", 24, 0.01, tuple(
        TaskDrift(name, 3, 3, 600, None, None, False) for name in names), unknown=0))
    assert [line.split()[0] for line in lines[2:]] == names
    assert len({line.index(" 3 ") for line in lines[2:]}) == 1
