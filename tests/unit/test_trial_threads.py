"""Trials that share a process, in threads: the results and records of one after the other."""

import dataclasses
import json
import threading

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from partialhn.features.extract import feature_jobs, precompute
from partialhn.networks.cut import CutNetwork
from partialhn.networks.device_memory import DeviceMemoryError
from pipelines.features.produce import open_store
from pipelines.platform.cluster import WorkerDevice
from pipelines.platform.storage import open_storage
from pipelines.search import trial as trials
from pipelines.search.sampling import TrialSource
from pipelines.search.state import SearchState, TrialPlan
from pipelines.search.trial import Bench, trial_results
from pipelines.tune.threads import TrialThreads


@pytest.fixture(scope="module")
def bench(tmp_path_factory, digits, config, network):
    storage = open_storage(str(tmp_path_factory.mktemp("threads")))
    trunk = CutNetwork.of(network, 4).trunk
    jobs = feature_jobs(config, digits[:3], trunk, (3, 4))
    manifests, _ = precompute(open_store(storage), trunk, jobs)
    return Bench(storage, network, tuple((each.name, tuple(each.classes)) for each in digits[:3]),
                 {(job.depth, job.task, job.split): manifest
                  for job, manifest in zip(jobs, manifests, strict=True)},
                 storage.path("running"), WorkerDevice(), 1)


@pytest.fixture
def plans(config):
    """Of both depths, each with a seed of its own."""
    return [TrialPlan(f"{seed:04d}", "search", dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, freeze_depth=3 + seed % 2),
        train=dataclasses.replace(config.train, seed=seed)).to_dict()) for seed in range(4)]


def run(bench, plans, tmp_path, scheduler=None, count=3):
    """Records by the name of the trial, and what was said."""
    bench = dataclasses.replace(bench, folder=str(tmp_path / "running"))
    records, lines = {}, []
    source = TrialSource(SearchState(open_storage(str(tmp_path)), "s"), plans, lambda: None,
                         lambda record: records.update({record.plan.id: record}), lambda: 0.0)
    TrialThreads(source, scheduler, bench, count, lines.append).run()
    return records, lines


def test_trials_in_threads_measure_what_they_do_alone(bench, plans, tmp_path):
    records, _ = run(bench, plans, tmp_path)
    assert sorted(records) == [plan.id for plan in plans]
    for plan in plans:
        alone = dataclasses.replace(bench, folder=str(tmp_path / "alone"))
        last = list(trial_results({"plan": dataclasses.asdict(plan)}, alone))[-1]
        wanted = json.loads(last["measured"])
        assert records[plan.id].status == "finished"
        assert [list(row) for row in records[plan.id].measured.rows] == wanted["rows"]


class StopsOne(FIFOScheduler):
    """Stops the trial 0001 after its first task."""

    def on_trial_result(self, tune_controller, trial, result):
        stops = trial.config["plan"]["id"] == "0001"
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE


def test_a_trial_is_stopped_and_the_others_go_on(bench, plans, tmp_path):
    records, _ = run(bench, plans[:3], tmp_path, StopsOne(), 2)
    assert [records[plan.id].status for plan in plans[:3]] == ["finished", "pruned", "finished"]
    assert len(records["0001"].measured.rows) == 1


@pytest.mark.parametrize("never", [False, True])
def test_memory_for_one_trial_is_enough_for_a_search(bench, plans, tmp_path, monkeypatch, never):
    """Of two at once one has no memory: it comes again when it is alone, or fails with the words.
    """
    learn, running, both = trials.learn, threading.Semaphore(1), threading.Barrier(2, timeout=60)
    attempts = []

    def short(plan, bench, go_on):
        attempts.append(plan.id)
        if len(attempts) <= 2:
            both.wait()
        if (never and plan.id == "0000") or not running.acquire(blocking=len(attempts) > 2):
            raise DeviceMemoryError("too little memory for this trial")
        try:
            yield from learn(plan, bench, go_on)
        finally:
            running.release()

    monkeypatch.setattr(trials, "learn", short)
    records, lines = run(bench, plans[:2], tmp_path, count=2)
    assert len(lines) == 1
    wanted = {"0000": "failed" if never else "finished", "0001": "finished"}
    assert {name: record.status for name, record in records.items()} == wanted
    assert not never or "too little memory" in records["0000"].reason
