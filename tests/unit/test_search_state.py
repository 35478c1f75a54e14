"""Records on disk, and what a resumed search makes of them."""

import dataclasses
import json
import pickle
import runpy
from pathlib import Path

import pytest
from ray.tune.search import Searcher

from partialhn.config import Config
from partialhn.errors import InputError, IntegrityError
from pipelines.platform.storage import open_storage
from pipelines.search.sampling import Goal, Proposals, TrialSource
from pipelines.search.space import parse_space
from pipelines.search.state import SearchState
from pipelines.search.stopping import AshaByDepth

SAMPLES = runpy.run_path(str(Path(__file__).with_name("search_samples.py")))
record, plan, measured = SAMPLES["record"], SAMPLES["plan"], SAMPLES["measured"]
BASE = Config()
RANDOM = Goal("random", 7, "accuracy", 0.01)
SPACE = parse_space({}, BASE, (2, 3))


@pytest.fixture
def state(tmp_path):
    return SearchState(open_storage(str(tmp_path)), "sample")


def test_records_come_back_as_they_were_and_in_order(state):
    late, early = record("0001", at=9.0, test_row=(0.1, 0.2)), record("0000", at=2.0)
    failed = record("0002", status="failed", at=3.0)
    for each in (late, early, failed):
        assert state.finish(each) == each
    assert state.records() == [early, failed, late]


def test_a_record_is_written_once(state):
    first, second = record("0000", row=(0.5, 0.5)), record("0000", row=(0.9, 0.9))
    assert state.finish(first) == first
    assert state.finish(second) == first
    assert state.records() == [first]


def test_a_trial_that_was_begun_and_has_no_record_was_interrupted(state, tmp_path):
    for trial in ("0000", "0001", "0002"):
        state.start(plan(trial))
    running = Path(state.running("0000"))
    running.mkdir(parents=True)
    state.finish(record("0000"))
    assert [each.id for each in state.interrupted()] == ["0001", "0002"]
    assert state.interrupted()[0] == plan("0001")
    assert not running.exists()


def test_settings_of_the_first_session_count(state):
    assert state.settings() is None
    assert state.create({"format": 1, "a": 1}) == {"format": 1, "a": 1}
    assert state.create({"format": 1, "a": 2}) == {"format": 1, "a": 1}


def test_something_measured_once_is_kept(state):
    assert state.keep("survey", lambda: {"a": [1, 2]}) == {"a": [1, 2]}
    assert state.keep("survey", lambda: pytest.fail("measured again")) == {"a": [1, 2]}


@pytest.mark.parametrize("content", ["{", "{}", '{"format": 9}', "[]"])
def test_damage_is_named(state, content):
    folder = Path(state.folder) / "trials"
    folder.mkdir(parents=True)
    (folder / "0003.json").write_text(content, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"0003\.json"):
        state.records()


# Proposals -----------------------------------------------------------------------------------


def test_the_first_trials_are_the_users_configuration_at_each_depth():
    proposals = Proposals(SPACE, BASE, RANDOM, [])
    for number, depth in ((0, 2), (1, 3)):
        found = proposals.propose(number)
        assert found.id == f"{number:04d}"
        assert found.depth == depth
        config = Config.from_dict(found.config)
        assert config == dataclasses.replace(BASE, backbone=config.backbone)


def test_every_depth_gets_as_many_trials():
    proposals = Proposals(SPACE, BASE, RANDOM, [])
    assert [proposals.propose(number).depth for number in range(6)] == [2, 3, 2, 3, 2, 3]


def test_a_random_trial_is_the_same_whatever_came_before():
    whole = [Proposals(SPACE, BASE, RANDOM, []).propose(number) for number in range(12)]
    resumed = Proposals(SPACE, BASE, RANDOM, [
        dataclasses.replace(record("0000"), plan=each) for each in whole[:5]])
    assert [resumed.propose(number) for number in range(5, 12)] == whole[5:]
    assert len({json.dumps(each.params) for each in whole}) == 12
    other = Proposals(SPACE, BASE, dataclasses.replace(RANDOM, seed=8), [])
    assert other.propose(5) != whole[5]


def learned(proposals, count, score):
    """Proposes and learns `count` trials whose accuracy `score` says; returns the last ones."""
    plans = []
    for number in range(count):
        each = proposals.propose(number)
        plans.append(each)
        value = score(each)
        proposals.learn(dataclasses.replace(record(each.id, row=(value, value)), plan=each))
    return plans


@pytest.mark.parametrize("algorithm", ["tpe", "multi"])
def test_tpe_learns_from_records_told_by_a_resumed_search(algorithm):
    """The best learning rate is at the lower end; later proposals look there."""
    goal = dataclasses.replace(RANDOM, algorithm=algorithm)
    space = parse_space({"defaults": False, "train.learning_rate": {"uniform": [0.001, 0.1]}},
                        BASE, (3,))
    first = learned(Proposals(space, BASE, goal, []), 25,
                    lambda each: 1 - each.config["train"]["learning_rate"])
    records = [dataclasses.replace(record(each.id, row=(
        1 - each.config["train"]["learning_rate"],) * 2), plan=each) for each in first]
    resumed = Proposals(space, BASE, goal, records)
    rates = [resumed.propose(number).config["train"]["learning_rate"]
             for number in range(25, 35)]
    assert sum(rates) / 10 < 0.03
    assert resumed.propose(30) == Proposals(space, BASE, goal, records).propose(30)


def test_a_stopped_trial_does_not_count_as_a_finished_one():
    """It was good after one task and was stopped later: its score must not look like a best."""
    stopped = record("0000", row=(0.99,), status="pruned", params={"train.epochs": 10})
    finished = record("0001", row=(0.5, 0.5), params={"train.epochs": 5})
    failed = record("0002", status="failed", params={"train.epochs": 5})
    study = Proposals(parse_space({}, BASE, (3,)), BASE, RANDOM,
                      [stopped, finished, failed]).study
    assert study.best_trial.user_attrs["trial"] == "0001"
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE", "FAIL"]


def test_values_that_do_not_go_together_are_drawn_again_or_refused():
    space = parse_space({"defaults": False, "hypernet.norm": {"choice": ["batch", "group"]},
                         "hypernet.norm_groups": {"choice": [7, 8]}}, BASE, (3,))
    norms = {(each.config["hypernet"]["norm"], each.config["hypernet"]["norm_groups"])
             for each in (Proposals(space, BASE, RANDOM, []).propose(n) for n in range(12))}
    assert ("group", 8) in norms
    assert ("group", 7) not in norms
    never = parse_space({"defaults": False, "hypernet.norm": "group",
                         "hypernet.norm_groups": {"choice": [7]}}, BASE, (3,))
    with pytest.raises(InputError, match=r"100 draws.*norm_groups is 7"):
        Proposals(never, BASE, RANDOM, []).propose(0)


# What Ray Tune is told -----------------------------------------------------------------------


def result(row, tasks=("a", "b"), failed=""):
    text = json.dumps(dataclasses.asdict(measured(row, tasks=tasks))) if row else ""
    return {"tasks_done": len(row), "accuracy": 0.5, "measured": text, "failed": failed}


def source(state, planned=(), more=lambda: None):
    ended = []
    return TrialSource(state, planned, more, ended.append, lambda: 5.0), ended


def test_interrupted_trials_come_first_then_new_ones_then_nothing(state):
    new = iter([plan("0007"), None])
    found, _ = source(state, [plan("0003")], lambda: next(new))
    assert found.suggest("x")["plan"]["id"] == "0003"
    assert found.suggest("y")["plan"]["id"] == "0007"
    assert found.suggest("z") == Searcher.FINISHED
    assert [each.id for each in state.interrupted()] == ["0003", "0007"]


@pytest.mark.parametrize(("told", "error", "status"), [
    (result((0.5, 0.6)), False, "finished"), (result((0.5,)), False, "pruned"),
    (result((), failed="loss is nan"), False, "failed"), (None, True, "failed")])
def test_a_trial_that_ended_gets_its_record(state, told, error, status):
    found, ended = source(state, [plan("0003")])
    found.suggest("x")
    found.on_trial_complete("x", told, error=error)
    assert [(each.status, each.search_seconds) for each in ended] == [(status, 5.0)]
    assert state.records() == ended
    assert state.interrupted() == []


def test_a_trial_that_was_cut_off_gets_none(state):
    found, ended = source(state, [plan("0003")])
    found.suggest("x")
    found.on_trial_complete("x", None)
    assert ended == []
    assert [each.id for each in state.interrupted()] == ["0003"]


def test_what_goes_wrong_ends_the_search(state):
    def broken():
        raise InputError("no space left")

    found, _ = source(state, more=broken)
    assert found.suggest("x") == Searcher.FINISHED
    assert str(found.error) == "no space left"


def test_nothing_of_a_search_is_in_ray_tunes_pickles(state):
    found, _ = source(state, [plan("0003")])
    assert b"0003" not in pickle.dumps(found)


# ASHA ----------------------------------------------------------------------------------------


class FakeTrial:
    def __init__(self, trial, depth):
        self.trial_id = f"tune-{trial}"
        self.config = {"plan": dataclasses.asdict(plan(trial, depth))}


def decision(asha, trial, depth, tasks_done, accuracy):
    fake = FakeTrial(trial, depth)
    asha.on_trial_add(None, fake)
    return asha.on_trial_result(None, fake, {"tasks_done": tasks_done, "accuracy": accuracy})


def test_a_clearly_worse_trial_stops_and_only_within_its_depth():
    tasks = ("a", "b", "c", "d")
    good = [record(f"000{index}", 3, (0.8, 0.8, 0.8, 0.8), tasks=tasks) for index in range(3)]
    assert decision(AshaByDepth(4, good), "0009", 3, 2, 0.5) == "STOP"
    assert decision(AshaByDepth(4, good), "0009", 3, 2, 0.9) == "CONTINUE"
    assert decision(AshaByDepth(4, good), "0009", 3, 1, 0.1) == "CONTINUE"
    assert decision(AshaByDepth(4, good), "0009", 4, 2, 0.5) == "CONTINUE"


def test_the_first_trials_of_a_depth_are_never_stopped():
    tasks = ("a", "b", "c", "d")
    good = [record(f"000{index}", 3, (0.8, 0.8, 0.8, 0.8), tasks=tasks) for index in range(2)]
    asha = AshaByDepth(4, good)
    assert decision(asha, "0008", 3, 2, 0.5) == "CONTINUE"
    assert decision(asha, "0009", 3, 2, 0.5) == "STOP"
