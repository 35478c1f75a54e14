"""Warnings about tasks that are close to guessing or below ridge regression."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from partialhn.evaluation.doubts import doubts
from partialhn.training.lineage import Learned
from partialhn.training.records import EpochRecord, TaskRecord
from partialhn.training.slots import Slot
from pipelines.gate import Decision, GateFacts, Policy, decide
from pipelines.report.facts import read_facts
from pipelines.report.text import text_summary
from pipelines.report.verdict import verdict
from pipelines.retrain.candidate import _doubts
from pipelines.retrain.outcome import PassOutcome
from tests.support import small_config

SAMPLES = runpy.run_path(str(Path(__file__).with_name("report_samples.py")))


@pytest.mark.parametrize(("numbers", "words"), [
    ((0.325, 200, 10), []), ((0.12, 200, 10), ["close to guessing (10.0 %)"]),
    ((0.23, 20, 10), ["close to guessing"]),  # 20 images: two standard errors are 13 points
    ((0.55, 50, 2), ["close to guessing (50.0 %)"]), ((1.0, 50, 1), []),
    ((0.6, 500, 10, 0.6, 0.62, 100), []), ((0.6, 500, 10, 0.6, 0.75, 100), ["right for 75.0 %"]),
    ((0.96, 72, 2, 28 / 29, 1.0, 29), []),  # one image of 29 is no difference
    ((0.6, 500, 10, 0.6, 0.75, 0), []), ((0.6, 500, 10, 0.6, None, 100), []),
    ((0.1, 500, 10, 0.1, 0.75, 100), ["guessing", "ridge regression"])])
def test_what_is_doubted(numbers, words):
    found = doubts(*numbers)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))


def test_a_task_that_later_ones_have_overwritten_is_doubted():
    """Once, by what happened to it: more images or steps do not help."""
    [text] = doubts(0.98, 60, 2, now=0.53)
    assert text == ("its accuracy fell from 98.0 % when it was learned to 53.0 %, which is close "
                    "to guessing (50.0 %), while later tasks were learned: do not use it")
    assert not doubts(0.98, 60, 2, now=0.9)
    assert "fell" not in doubts(0.5, 60, 2, now=0.5)[0]
    result = SAMPLES["sample"](n_tasks=2, n_classes=2)
    result["accuracy_matrix"] = [[0.95, None], [0.5, 0.95]]
    (found,) = read_facts(result).doubts
    assert found[0] == result["tasks"][0]["name"]
    assert "fell from 95.0 %" in found[1]


def test_steps_are_advised_where_some_were_taken():
    [solved], [trained] = (doubts(0.1, 500, 10, losses=losses) for losses in ((), (2.4, 2.3)))
    assert solved.endswith("do not use it; it needs more images")
    assert "--min-steps and --trunk-min-steps; retrain takes these from --config" in trained


@pytest.mark.parametrize(("losses", "said"), [
    ([7077.2, 106562.4], "from 7,077 in its first epoch to 106,562 in its last"),
    ([0.5, 9.0, 4.7], "from 0.50 in its first epoch to 4.70 in its last"),
    ([79545.1, 1910.7], "is 1,911, that of guessing 2.30"),
    ([0.5, 4.5], None), ([9.0, 8.0], None), ([9.0], None), ([2.4, 1.1], None), ([], None)])
def test_a_loss_that_diverged_is_said_and_no_advice_about_steps(losses, said):
    """The loss of guessing among ten classes is 2.30. What diverged needs no more steps."""
    for accuracy, others in ((0.9, 0), (0.1, 2)):
        found = doubts(accuracy, 500, 10, accuracy, 0.95, 100 * (accuracy < 0.5), losses, 100.0)
        assert len(found) == others + (said is not None)
        assert (said is not None) == any("learning rate of 100 is too high" in text
                                         for text in found)
        if said:
            assert said in found[0]
            assert not any("steps" in text or "longer" in text for text in found)
    assert not doubts(1.0, 50, 1, losses=losses)


def test_a_task_that_diverged_is_said_although_ridge_regression_took_its_place():
    result = SAMPLES["sample"](3)
    name = result["tasks"][1]["name"]
    result["config"]["train"]["learning_rate"] = 100.0
    own = [epoch for epoch in result["epochs"] if epoch["task_index"] == 1]
    own[0]["cross_entropy"], own[-1]["cross_entropy"] = 7077.2, 106562.4
    place = result["epochs"].index(own[-1]) + 1
    result["epochs"].insert(place, own[-1] | {"passes": 0, "solved": True, "cross_entropy": 0.1})
    said = f"WARNING task {name!r}: its loss rose from 7,077 in its first epoch to 106,562"
    assert said in text_summary(result)
    [caution] = [text for text in verdict(read_facts(result)).cautions if "its loss rose" in text]
    assert "the learning rate of 100 is too high" in caution
    result["epochs"][place - 1]["cross_entropy"] = 0.2
    assert "its loss rose" not in text_summary(result)


@pytest.mark.parametrize("passes", [1, 0])
def test_a_pass_of_retrain_says_it_too(passes):
    config = small_config(train={"learning_rate": 100.0})
    epochs = [EpochRecord("a", 0, number, 3, loss, loss, 0.0, 0.5, 0.9, 1.0, passes=each)
              for number, loss, each in ((1, 7.0, 1), (2, 9.0, 1), (3, 0.1, passes))]
    record = TaskRecord("a", 0, (0.95,), 1.0, 1.0)
    manifest = SimpleNamespace(rows=200)
    slot = Slot("a", ("x", "y"), "", "none", {"test": manifest, "validation": manifest})
    found = _doubts(config, [slot], Learned("id", "", record, tuple(epochs), 10))
    assert [text.partition(":")[0] for text in found] == [
        "its loss rose from 7.00 in its first epoch to 9.00 in its last"][passes:]


def bad_result():
    """A result whose second task was right for one of ten classes, and ridge for more."""
    result = SAMPLES["sample"](3)
    task = result["tasks"][1]
    task |= {"classes": list("abcdefghij"), "test_images": 200, "validation_images": 100}
    for row in result["accuracy_matrix"][1:]:
        row[1] = 0.11
    last = [epoch for epoch in result["epochs"] if epoch["task_index"] == 1][-1]
    last |= {"validation_accuracy": 0.1, "ridge_accuracy": 0.6}
    return result, task["name"]


def test_terminal_and_report_say_it_loudly():
    result, name = bad_result()
    text = text_summary(result)
    assert f"WARNING task {name!r}: its accuracy of 11.0 % is close to guessing (10.0 %)" in text
    assert f"WARNING task {name!r}: ridge regression" in text
    cautions = verdict(read_facts(result)).cautions
    assert f"Task “{name}” would be refused: it is 1.0 point above guessing" in cautions[0]
    assert "close to guessing" in cautions[1]
    assert "ridge regression" in cautions[2]
    assert "WARNING" not in text_summary(SAMPLES["sample"](3))


def test_the_gate_passes_them_on_whatever_it_decides():
    warning = doubts(0.12, 200, 10)
    facts = GateFacts.of_rows(["a"], [[0.12]], 10, images=200, doubts=warning)
    for policy in (Policy(), Policy(min_above_chance=None)):
        decision = decide(policy, facts)
        assert decision.warnings == warning
        assert Decision.from_fields(decision.fields()) == decision
        outcome = PassOutcome("s", learned=[{"slot": "a", "stream": "s", "version": 1,
                                             "decision": decision.fields()}])
        assert any(line.startswith("WARNING task 'a': its accuracy") for line in outcome.lines())
    old = decide(Policy(), facts).fields()
    del old["warnings"]  # as version 0.1.0 stored it
    assert Decision.from_fields(old).warnings == ()
