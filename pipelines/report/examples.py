"""The report's section on answers: images that got right and wrong ones, and confused classes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.data.experience import task_of
from partialhn.numbers import percent
from pipelines.report.charts import escape, shorten
from pipelines.report.facts import Facts
from pipelines.report.html import section

OPEN = 6
"""Tasks that are shown at once; the others are folded in."""
_BASE64 = re.compile("[A-Za-z0-9+/]+=*")


def examples(facts: Facts) -> str:
    """Example images of each reviewed task with the model's answers; empty without a review."""
    reviews = [each for each in facts.result.get("review") or []
               if each.get("examples") or each.get("confused")]
    if not reviews:
        return ""
    lead = ("Test images with the class that they show and, where the answer was wrong, the answer."
            " The share is the model's own probability.")
    if len(reviews) < len(facts.tasks):
        lead += (f" Shown are {len(reviews)} of {len(facts.tasks)} tasks: the newest, and those "
                 "with the least accuracy above guessing.")
    parts = [_task(each) for each in reviews]
    more = ""
    if parts[OPEN:]:
        more = (f"<details><summary>{len(parts) - OPEN} more tasks</summary>"
                f"{''.join(parts[OPEN:])}</details>")
    return section("Right and wrong answers", lead, *parts[:OPEN], more)


def _task(review: Mapping[str, Any]) -> str:
    shown = [each for each in review.get("examples") or []
             if _BASE64.fullmatch(str(each.get("image") or ""))]
    shots, task = "".join(map(_shot, shown)), task_of(str(review.get("task")))
    return (f'<div class="shots-of"><h3>Task “{escape(task)}”</h3>'
            f"<p>{escape(_confused(review.get('confused') or []))}</p>"
            + (f'<ul class="shots">{shots}</ul>' if shots else "") + "</div>")


def _confused(pairs: Sequence[Mapping[str, Any]]) -> str:
    if not pairs:
        return "No test image got a wrong answer."
    words = [f"“{pair['class']}” is taken for “{pair['taken_for']}” in {pair['images']:,} of "
             f"{pair['of']:,} images" for pair in pairs[:3]]
    return f"Most confused: {'; '.join(words)}."


def _shot(each: Mapping[str, Any]) -> str:
    label, answer = str(each.get("label")), str(each.get("answer"))
    right = label == answer
    said = "" if right else f"<b>answer: {escape(shorten(answer, 24))}</b>"
    probability = percent(each.get("probability"), 0)
    return (f'<li class="{"right" if right else "wrong"}">'
            f'<img src="data:image/jpeg;base64,{each["image"]}" width="64" height="64" '
            f'alt="{escape(label)}"><span>{"✓" if right else "✕"} {escape(shorten(label, 24))}'
            f"{said}<small>{probability}</small></span></li>")
