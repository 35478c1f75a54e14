"""The gate's decisions, worked out by hand."""

import dataclasses
import json
import math

import pytest

from partialhn.errors import InputError
from pipelines.gate import Decision, GateFacts, Policy, decide, load_policy

NOTHING = Policy(max_loss_on_earlier_task=None, min_above_chance=None)
FACTS = GateFacts("new", classes=4, after={"a": 0.90, "b": 0.70, "new": 0.60},
                  before={"a": 0.91, "b": 0.75}, images=100, linear_probe=0.55, seconds=100.0,
                  bytes_per_task=5000)


def test_an_earlier_task_may_lose_so_much_and_no_more():
    assert decide(Policy(max_loss_on_earlier_task=0.05), FACTS).passed
    refused = decide(Policy(max_loss_on_earlier_task=0.02), FACTS)
    assert not refused.passed
    assert refused.reasons == ("task 'b': 0.750 -> 0.700, loss 0.050, allowed at most 0.02",)
    assert [row.task for row in refused.suffering] == ["b"]
    assert [(row.task, row.passed) for row in refused.tasks] == [("a", True), ("b", False),
                                                                 ("new", True)]
    assert decide(NOTHING, FACTS).passed


@pytest.mark.parametrize(("limit", "passes", "fails", "reason"), [
    ("min_accuracy_new", 0.60, 0.61, "accuracy 0.600, wanted at least 0.61"),
    ("min_above_chance", 0.35, 0.36, "above chance (0.250) 0.350, wanted at least 0.36"),
    ("min_against_linear_probe", 0.05, 0.06, "linear probe (0.550) 0.050, wanted at least 0.06"),
    ("max_seconds", 100, 99, "seconds 100, allowed at most 99"),
    ("max_bytes_per_task", 5000, 4999, "bytes of the task 5000, allowed at most 4999")])
def test_every_limit_at_its_edge(limit, passes, fails, reason):
    assert decide(dataclasses.replace(NOTHING, **{limit: passes}), FACTS).passed
    refused = decide(dataclasses.replace(NOTHING, **{limit: fails}), FACTS)
    assert not refused.passed
    assert len(refused.reasons) == 1
    assert "task 'new': " in refused.reasons[0]
    assert reason in refused.reasons[0]


@pytest.mark.parametrize(("limit", "fact"), [
    ("min_against_linear_probe", "linear_probe"), ("max_seconds", "seconds"),
    ("max_bytes_per_task", "bytes_per_task")])
def test_what_was_not_measured_does_not_pass(limit, fact):
    facts = dataclasses.replace(FACTS, **{fact: None})
    refused = decide(dataclasses.replace(NOTHING, **{limit: 1}), facts)
    assert "not measured" in refused.reasons[0]
    assert decide(NOTHING, facts).passed


def test_an_earlier_task_that_was_not_measured_does_not_pass():
    facts = dataclasses.replace(FACTS, after={"a": 0.91, "new": 0.6})
    assert decide(Policy(), facts).reasons == ("task 'b': accuracy was not measured",)


@pytest.mark.parametrize("facts", [
    dataclasses.replace(FACTS, after=FACTS.after | {"b": math.nan}),
    dataclasses.replace(FACTS, after=FACTS.after | {"new": math.nan}),
    dataclasses.replace(FACTS, before={"b": math.nan})])
def test_not_a_number_does_not_pass(facts):
    assert not decide(Policy(max_loss_on_earlier_task=0.5), facts).passed


def test_the_first_task_has_nothing_to_lose():
    assert decide(Policy(), GateFacts("0", 2, {"0": 0.9}, images=50)).passed
    assert not decide(Policy(), GateFacts("0", 2, {"0": 0.55}, images=5000)).passed, "0.05 above"


@pytest.mark.parametrize(("accuracy", "images", "passed"), [
    (0.62, 50, False),  # shuffled labels got as far in a recorded year; guessing does in 6 of 100
    (0.62, 150, True), (0.68, 50, True), (1.0, 6, False), (1.0, 7, True), (0.9, None, False)])
def test_luck_with_few_images_does_not_pass(accuracy, images, passed):
    decision = decide(Policy(), GateFacts("0", 2, {"0": accuracy}, images=images))
    assert decision.passed == passed
    assert passed or any("p-value" in reason for reason in decision.reasons)
    for asks_not in ({"max_p_value": None}, {"min_above_chance": None}):
        assert decide(Policy(**asks_not), GateFacts("0", 2, {"0": accuracy}, images=images)).passed


def test_small_losses_do_not_add_up_unseen():
    """Two steps of 1.5 points each: the best ever counts, not the version before."""
    rows = [[0.900], [0.885, 0.9], [0.870, 0.9, 0.9]]
    facts = GateFacts.of_rows(["a", "b", "c"], rows, 10, seconds=1.0)
    assert facts == GateFacts("c", 10, {"a": 0.870, "b": 0.9, "c": 0.9}, {"a": 0.9, "b": 0.9},
                              seconds=1.0)
    assert [row.task for row in decide(Policy(), facts).suffering] == ["a"]


def test_a_decision_survives_json():
    for policy in (Policy(), Policy(max_loss_on_earlier_task=0.5)):
        decision = decide(policy, FACTS)
        assert Decision.from_fields(json.loads(json.dumps(decision.fields()))) == decision


def test_a_policy_file(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("max_loss_on_earlier_task: 0.01\nmin_above_chance: null\nmax_seconds: 600\n")
    assert load_policy(path) == Policy(0.01, min_above_chance=None, max_seconds=600.0)
    path.write_text("{}")
    assert load_policy(path) == Policy()


@pytest.mark.parametrize(("text", "message"), [
    ("max_los: 0.1", "unknown configuration key policy.max_los; allowed: .*max_loss"),
    ("max_loss_on_earlier_task: a lot", "policy.max_loss_on_earlier_task is 'a lot'"),
    ("min_accuracy_new: 70", "min_accuracy_new is 70.0; allowed: 0 to 1"),
    ("max_loss_on_earlier_task: .nan", "max_loss_on_earlier_task is nan"),
    ("[1]", "holds list; allowed: the keys max_loss"), ("{a", "is not YAML"),
    ("", "holds NoneType"), ("[" * 5000, "is not YAML")])
def test_policy_files_that_cannot_be(tmp_path, text, message):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_policy(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_policy(tmp_path / "none.yaml")
