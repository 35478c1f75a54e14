"""A model that forgets a task: the others answer as before, and the detector never had it."""

import dataclasses

import pytest
import torch

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import Config
from partialhn.detector.detector import Detector
from partialhn.errors import InputError
from partialhn.networks.tensors import tensors_below
from partialhn.predict import Predictor
from partialhn.strategies import STRATEGIES
from partialhn.training.answers import answer
from partialhn.training.forgetting import (
    records_without,
    slots_of_task,
    stays,
    without_slots,
)
from partialhn.training.learner import Learner
from partialhn.training.lineage import Learned
from partialhn.training.result import Outcome

NAMES = ("a", "b", "c")
INFOS = tuple(TaskInfo(name, (f"{name}-0", f"{name}-1")) for name in NAMES)


def learned(cut, config, tasks):
    learner = Learner(STRATEGIES[config.train.strategy](cut.head, cut.start, config), config.train,
                      inference=Detector(config.train.detector_features))
    list(learner.learn(tasks[:3]))
    return learner, Model(config, cut.trunk, learner.strategy, INFOS, inference=learner.inference)


def changed(config: Config, **hypernet) -> Config:
    return dataclasses.replace(config, hypernet=dataclasses.replace(config.hypernet, **hypernet),
                               train=dataclasses.replace(config.train, epochs=1))


@pytest.fixture(scope="module")
def model(cut, config, tasks):
    return learned(cut, config, tasks)


def images_of(task):
    rows = torch.arange(len(task.test))
    return task.test.gather(rows, torch.zeros_like(rows))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_the_other_tasks_answer_as_before_and_the_detector_never_had_it(model, tasks, gone,
                                                                        tmp_path):
    learner, before = model
    without_slots(before, [gone], tasks[gone].train).save(tmp_path / "model")
    after = Model.load(tmp_path / "model")
    assert [task.name for task in after.tasks] == [name for name in NAMES if name != NAMES[gone]]
    kept = [task for task in range(3) if task != gone]
    old, new = Predictor(before), Predictor(after)
    for task in kept:
        z_BCHW = images_of(tasks[task])
        given = [NAMES[task]] * len(z_BCHW)
        assert old.answers(z_BCHW, given) == new.answers(z_BCHW, given)
    never = Detector(learner.config.detector_features)
    for task in kept:
        never.add_task(never.statistics(
            tasks[task].train, tasks[task].validation, tasks[task].classes,
            answer(learner.strategy, task, tasks[task].validation)[0]))
    assert isinstance(after.inference, Detector)
    assert torch.equal(after.inference.scatter_P, never.scatter_P)
    z_BCHW = images_of(tasks[kept[0]])
    head, weights = learner.strategy.head, [learner.strategy.weights(task) for task in kept]
    for found, expected in zip(after.inference.infer(head, (0, 1), weights, z_BCHW)[1:],
                               never.infer(head, (0, 1), weights, z_BCHW)[1:], strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(InputError, match="allowed: "):
        new.task_index(NAMES[gone])


def test_what_stays_is_said(model):
    _, before = model
    assert [len(stays(before, [slot])) for slot in (0, 1)] == [2, 0]


def test_the_stream_goes_on_without_its_first_task(model, cut, config, tasks):
    learner, before = model
    after = without_slots(before, [0], tasks[0].train)
    records = [records_without(Learned.of(Outcome.of(learner), NAMES, index), [0], f"{index}", "")
               for index in (1, 2)]
    assert [each.record.task_index for each in records] == [0, 1]
    assert records[1].record.accuracy_row == learner.finished[2].accuracy_row[1:]
    again = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train,
                    inference=Detector(config.train.detector_features))
    again.restore(after.tensors(), {
        "classes": [2, 2], "epochs": [dataclasses.asdict(epoch) for each in records
                                      for epoch in each.epochs],
        "finished": [dataclasses.asdict(each.record) for each in records]})
    list(again.learn([*tasks[1:3], tasks[3]]))
    assert again.finished[-1].accuracy_row[:2] == learner.finished[2].accuracy_row[1:]
    assert int(again.strategy.tasks[2].start) == -1
    stored = tensors_below(after.tensors(), "strategy.")
    assert torch.equal(again.strategy.state_dict()["hypernet.base.0"], stored["hypernet.base.0"])
    assert torch.isfinite(again.strategy.weights(2).classifier_KF).all()


@pytest.mark.parametrize("generator", ["bilinear", "additive"])
def test_shared_generators_keep_what_they_share_and_say_so(cut, config, tasks, generator):
    _, before = learned(cut, changed(config, generator=generator), tasks)
    after = without_slots(before, [1], tasks[1].train)
    z_BCHW = images_of(tasks[2])
    assert Predictor(before).answers(z_BCHW, ["c"] * len(z_BCHW)) == Predictor(after).answers(
        z_BCHW, ["c"] * len(z_BCHW))
    assert "share" in stays(before, [1])[-1]


def test_a_task_that_others_start_from_stays(cut, config, tasks):
    _, before = learned(cut, changed(config, starts_from="previous"), tasks)
    with pytest.raises(InputError, match="are added to its own"):
        without_slots(before, [1], tasks[1].train)
    assert len(without_slots(before, [2], tasks[2].train).tasks) == 2


def test_a_strategy_that_shares_everything_forgets_nothing(cut, config, tasks):
    naive = dataclasses.replace(changed(config), train=dataclasses.replace(
        config.train, strategy="naive", epochs=1))
    _, before = learned(cut, naive, tasks)
    with pytest.raises(InputError, match="cannot forget a task"):
        without_slots(before, [1], tasks[1].train)


def test_without_its_features_a_task_cannot_be_forgotten(model):
    with pytest.raises(InputError, match="training features are missing"):
        without_slots(model[1], [1], None)


def test_unknown_and_only_tasks_are_refused():
    assert slots_of_task(["a", "b", "a/2"], "a") == [0, 2]
    with pytest.raises(InputError, match="task is 'c'; allowed: a, b"):
        slots_of_task(["a", "b"], "c")
    with pytest.raises(InputError, match="the only one"):
        slots_of_task(["a", "a/2"], "a")
