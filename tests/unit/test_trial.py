"""A trial in this process, on real digits: the numbers of the library, and it goes on when cut."""

import dataclasses

import pytest
import torch

from partialhn.checkpoints.checkpoint import fetch
from partialhn.detector.detector import Detector
from partialhn.features.extract import feature_jobs, precompute
from partialhn.networks.cut import CutNetwork
from partialhn.run import cut_network
from partialhn.strategies import STRATEGIES
from partialhn.training.answers import evaluate
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from pipelines.features.produce import open_store
from pipelines.platform.cluster import WorkerDevice
from pipelines.platform.storage import open_storage
from pipelines.search.state import TrialPlan
from pipelines.search.trial import Bench, learn, open_features, run_trial

DEPTHS = (3, 4)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, config, digits, network):
    storage = open_storage(str(tmp_path_factory.mktemp("bench")))
    jobs = feature_jobs(config, digits[:3], CutNetwork.of(network, 4).trunk, DEPTHS)
    manifests, _ = precompute(open_store(storage), CutNetwork.of(network, 4).trunk, jobs)
    return Bench(storage, network, tuple((each.name, tuple(each.classes)) for each in digits[:3]),
                 {(job.depth, job.task, job.split): manifest
                  for job, manifest in zip(jobs, manifests, strict=True)},
                 storage.path("running"), WorkerDevice(), 1)


def planned(config, trial, kind="search", depth=3):
    backbone = dataclasses.replace(config.backbone, freeze_depth=depth)
    return TrialPlan(trial, kind, dataclasses.replace(config, backbone=backbone).to_dict())


def test_a_trial_is_a_stream_judged_on_held_out_images(bench, config, network):
    cut = cut_network(config, network)
    tasks = [TaskFeatures(name, len(classes), open_features(bench, (3, name, "train")), None,
                          open_features(bench, (3, name, "validation")))
             for name, classes in bench.tasks]
    learner = Learner(cut.strategy(config), config.train)
    for _ in learner.learn(tasks):
        pass
    found = list(learn(planned(config, "0000"), bench))
    assert [len(each.rows) for each in found] == [1, 2, 3]
    assert found[-1].rows == tuple(record.accuracy_row for record in learner.finished)
    assert found[-1].test_row is None
    assert found[-1].epochs == 3 * config.train.epochs


def test_an_unknown_task_is_judged_among_the_classes_of_all_tasks(bench, config, network):
    unknown = dataclasses.replace(bench, unknown_task=True)
    begun = learn(planned(config, "unknown", "final"), unknown)
    assert len(next(begun).rows) == 1
    begun.close()
    last = list(learn(planned(config, "unknown", "final"), unknown))[-1]
    assert [len(row) for row in last.rows] == [1, 2, 3]
    tasks = [TaskFeatures(name, len(classes), open_features(bench, (3, name, "train")), None,
                          open_features(bench, (3, name, "validation")))
             for name, classes in bench.tasks]
    learner = Learner(cut_network(config, network).strategy(config), config.train,
                      inference=Detector(config.train.detector_features))
    list(learner.learn(tasks))
    assert [sum(row) / len(row) for row in last.rows] == pytest.approx(
        [record.without_id["acc"] for record in learner.finished])
    answers = last.answers([len(task.test) for task in tasks])
    assert [right_N.mean() for right_N in answers] == pytest.approx(last.rows[-1])
    assert len(last.test_row) == 3


def test_only_final_runs_look_at_test_images(bench, config, network):
    last = list(learn(planned(config, "final-0000-s1", "final"), bench))[-1]
    cut = cut_network(config, network)
    learner = Learner(STRATEGIES["partial_hn"](cut.head, cut.start, config), config.train)
    tests = [open_features(bench, (3, name, "test")) for name, _ in bench.tasks]
    tasks = [TaskFeatures(name, len(classes), open_features(bench, (3, name, "train")), None, test)
             for (name, classes), test in zip(bench.tasks, tests, strict=True)]
    for _ in learner.learn(tasks):
        pass
    assert last.test_row == tuple(evaluate(learner.strategy, index, test)
                                  for index, test in enumerate(tests))


def test_an_interrupted_trial_goes_on_after_its_last_task(bench, config):
    whole = list(learn(planned(config, "whole"), bench))[-1]
    begun = learn(planned(config, "cut"), bench)
    assert len(next(begun).rows) == 1
    begun.close()
    again = list(learn(planned(config, "cut"), bench))
    assert [len(each.rows) for each in again] == [1, 2, 3]
    assert again[-1].rows == whole.rows
    assert again[-1].epochs == whole.epochs


def test_within_a_task_state_is_kept_too(bench, config, monkeypatch, tmp_path):
    monkeypatch.setattr("pipelines.search.trial.STATE_SECONDS", 0.0)
    kept = []
    monkeypatch.setattr("pipelines.search.trial.checkpoint.upload",
                        lambda folder, filesystem, target: kept.append(target))
    list(learn(planned(config, "often"), bench))
    assert len(kept) == 3 * (config.train.epochs + 1)
    assert not fetch(bench.storage.filesystem, kept[0], tmp_path / "none")


def test_fewer_views_are_the_first_of_those_stored(bench, config):
    one = dataclasses.replace(config, features=dataclasses.replace(config.features, views=1))
    two = list(learn(planned(config, "views-2"), bench))[-1]
    found = list(learn(planned(one, "views-1"), bench))[-1]
    test = bench.manifests[3, bench.tasks[0][0], "test"].bytes
    assert test < found.feature_bytes < two.feature_bytes
    features = open_features(bench, (3, bench.tasks[0][0], "train"))
    rows_B = torch.tensor([0, 3])
    assert torch.equal(features.first_views(1).gather(rows_B, torch.zeros(2, dtype=int)),
                       features.gather(rows_B, torch.zeros(2, dtype=int)))


def test_costs_are_those_of_the_parts(bench, config):
    shallow, deep = (list(learn(planned(config, f"cost-{depth}", depth=depth), bench))[-1]
                     for depth in DEPTHS)
    assert deep.feature_bytes < shallow.feature_bytes
    assert deep.head_bytes == 4 * 2 * bench.network.width  # a scale and a shift a feature
    assert shallow.head_bytes > deep.head_bytes
    cut = cut_network(config, bench.network)
    generating = cut.head.weight_count * config.hypernet.fresh_columns
    assert shallow.serving_macs == int(cut.macs["trunk"] + cut.macs["head"]) + generating
    assert shallow.processor_seconds > 0
    assert shallow.device == "cpu"


@pytest.mark.parametrize(("generator", "norm"), [("additive", "group"), ("bilinear", "instance"),
                                                   ("columns", "batch")])
def test_every_generator_and_norm_is_a_trial(bench, config, generator, norm):
    hypernet = dataclasses.replace(config.hypernet, generator=generator, norm=norm, norm_groups=4)
    changed = dataclasses.replace(config, hypernet=hypernet)
    assert len(list(learn(planned(changed, f"{generator}-{norm}"), bench))) == 3


def test_separate_heads_are_a_trial_too(bench, config):
    heads = dataclasses.replace(config, train=dataclasses.replace(
        config.train, strategy="separate_heads"))
    last = list(learn(planned(heads, "bound-0000-s1", "bound"), bench))[-1]
    assert last.bytes_per_task > last.head_bytes


def test_a_trial_without_memory_says_how_much_it_asked_for(bench, config, monkeypatch):
    """So many columns that the system refuses their memory; the process lives on."""
    from ray import tune

    told = []
    monkeypatch.setattr(tune, "report", told.append)
    wide = dataclasses.replace(config, hypernet=dataclasses.replace(config.hypernet,
                                                                    fresh_columns=10**9))
    shared = dataclasses.replace(bench, device=WorkerDevice("cpu", 0.25))
    run_trial({"plan": dataclasses.asdict(planned(wide, "wide"))}, shared)
    assert "too little memory for training task" in told[-1]["failed"]
    assert "tried to allocate" in told[-1]["failed"]
    assert told[-1]["failed"].endswith("or more than 0.25 of a GPU for a trial (gpus_per_trial)")
    run_trial({"plan": dataclasses.asdict(planned(config, "after"))}, shared)
    assert told[-1]["failed"] == ""
    assert told[-1]["tasks_done"] == 3


def test_a_trial_that_cannot_work_says_why(bench, config, monkeypatch):
    from ray import tune

    told = []
    monkeypatch.setattr(tune, "report", told.append)
    wild = dataclasses.replace(config, train=dataclasses.replace(config.train,
                                                                 learning_rate=1e18))
    run_trial({"plan": dataclasses.asdict(planned(wild, "wild"))}, bench)
    assert "learning_rate" in told[-1]["failed"]
    assert told[-1]["measured"] == ""
