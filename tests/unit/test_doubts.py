"""Warnings about tasks that are close to guessing or below ridge regression."""

import runpy
from pathlib import Path

import pytest

from partialhn.evaluation.doubts import doubts
from pipelines.gate import Decision, GateFacts, Policy, decide
from pipelines.report.facts import read_facts
from pipelines.report.text import text_summary
from pipelines.report.verdict import verdict
from pipelines.retrain.outcome import PassOutcome

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
