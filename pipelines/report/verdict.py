"""The report's verdict: one paragraph in plain words, for a reader from outside the field."""

import dataclasses

import numpy as np

from pipelines.platform.numbers import duration, in_points, percent, points, size
from pipelines.report.facts import FORGETTING_LIMIT, GAP_LIMIT, Facts, break_even

NOTICEABLE = 0.05
"""Accuracy lost on a single task that the verdict names even when the mean is good."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict; `status` is good, fair or bad, and `cautions` limit what the numbers show."""

    status: str
    headline: str
    paragraph: str
    cautions: tuple[str, ...]


def verdict(facts: Facts) -> Verdict:
    """The verdict in plain language, computed from the numbers alone."""
    forgets = facts.metrics.forgetting > FORGETTING_LIMIT + 1e-9
    behind = facts.gap is not None and facts.gap > GAP_LIMIT + 1e-9
    chance = facts.chance
    useless = chance is not None and facts.metrics.accuracy < chance + 0.1 * (1 - chance)
    count = _tasks(len(facts.tasks))
    if useless:
        status, headline = "bad", "It did not learn: its accuracy is close to guessing."
    elif forgets and behind:
        status, headline = "bad", "It forgets, and it is less accurate than separate heads."
    elif forgets:
        status, headline = "bad", f"It learned {count}, but forgets the earlier ones."
    elif behind:
        status = "fair"
        headline = "It remembers its tasks, but is less accurate than separate heads."
    elif facts.metrics.forgetting_per_task[_worst(facts)] > NOTICEABLE:
        status = "fair"
        headline = f"It learned {count}, but task “{facts.tasks[_worst(facts)]}” lost noticeably."
    elif len(facts.tasks) == 1:
        status, headline = "good", "It learned its first task; nothing could be forgotten yet."
    else:
        status, headline = "good", f"It learned {count} and still remembers all of them."
    sentences = [_learned(facts), _kept(facts, forgets), _against_baselines(facts, behind),
                 _cost(facts)]
    return Verdict(status, headline, " ".join(s for s in sentences if s), _cautions(facts))


def _worst(facts: Facts) -> int:
    return int(np.argmax(facts.metrics.forgetting_per_task))


def _tasks(n: int) -> str:
    return "1 task" if n == 1 else f"{n} tasks"


def _learned(facts: Facts) -> str:
    classes = sum(len(task.get("classes") or ()) for task in facts.details)
    what = _tasks(len(facts.tasks)) + (" one after another" if len(facts.tasks) > 1 else "")
    what += f" ({classes:,} classes in all)" if classes else ""
    again = " without going back to the images of earlier ones" if len(facts.tasks) > 1 else ""
    guess = f"; guessing would get {percent(facts.chance)}" if facts.chance is not None else ""
    return (f"The model learned {what}{again}. When the task of an image is given, it predicts "
            f"the right class for {percent(facts.metrics.accuracy)} of test images{guess}.")


def _kept(facts: Facts, forgets: bool) -> str:
    if len(facts.tasks) == 1:
        return ""
    drops = facts.metrics.forgetting_per_task
    worst = _worst(facts)
    if max(drops) < 1e-3:
        lost = "any accuracy" if max(drops) == 0 else "as much as 0.1 percentage points"
        return f"Earlier tasks still work: none of them lost {lost} while later ones were learned."
    most = (f"most of all task “{facts.tasks[worst]}”, from "
            f"{percent(facts.accuracy_TT[-1, worst] + drops[worst])} at its best to "
            f"{percent(facts.accuracy_TT[-1, worst])}")
    lost = (f"lost {points(facts.metrics.forgetting)} percentage points on average since "
            "their best")
    if forgets:
        return (f"It forgets: earlier tasks {lost}, {most}. This is more than the 1 point that "
                "counts as acceptable here, so check earlier tasks before relying on them.")
    return f"Earlier tasks still work: they {lost}, {most}."


def _against_baselines(facts: Facts, behind: bool) -> str:
    sentences = []
    gap, naive = facts.gap, facts.baselines.get("naive")
    if gap is not None:
        reach = ("A separate head for every task, which cannot forget, reaches "
                 f"{percent(facts.metrics.accuracy + gap)}")
        if behind:
            sentences.append(f"{reach}: {in_points(gap)} better, more than the 2 points that "
                             "count as acceptable here. Where accuracy matters more than size, "
                             "separate heads are the better choice for this stream.")
        elif gap >= 5e-4:
            sentences.append(f"{reach}, {in_points(gap)} better.")
        elif gap > -5e-4:
            sentences.append(f"{reach}, no better.")
        else:
            sentences.append(f"{reach}, {in_points(-gap)} less.")
    if naive is not None and naive.acc is not None and len(facts.tasks) > 1:
        worth = facts.metrics.accuracy - naive.acc
        ends = f"Naive fine-tuning, which protects nothing, ends at {percent(naive.acc)}"
        if worth >= 5e-4:
            sentences.append(f"{ends}: protecting the earlier tasks gains {in_points(worth)}.")
        elif worth > -5e-4:
            sentences.append(f"{ends}: on this stream the protection gained nothing.")
        else:
            sentences.append(f"{ends}, {in_points(-worth)} better: on this stream the protection "
                             "cost more than it gained.")
    if not sentences:
        return ("No baseline was trained, so this report cannot say how much accuracy sharing one "
                "model costs.")
    return " ".join(sentences)


def _cost(facts: Facts) -> str:
    ours, separate = facts.ours.bytes_per_task, facts.baselines.get("separate_heads")
    parts = []
    if facts.task_seconds is not None:
        parts.append(f"took {duration(facts.task_seconds)}")
    if ours is not None:
        adds = f"adds {size(ours)} to the model"
        if separate is not None and separate.bytes_per_task:
            adds += f", against {size(separate.bytes_per_task)} for a separate head"
        parts.append(adds)
    if not parts:
        return ""
    cost = f"A new task {' and '.join(parts)}."
    pays = break_even(facts)
    if pays is not None:
        cost += (f" With the part that all tasks share, the model is smaller than separate "
                 f"heads from {_tasks(pays)} on.")
    return cost


def _cautions(facts: Facts) -> tuple[str, ...]:
    cautions = [f"Task “{task}”: {text}." for task, text in facts.doubts]
    cautions += [f"{text}." for text in facts.forgotten]
    if refused := facts.result.get("challenger"):
        reasons = (refused.get("decision") or {}).get("reasons") or ["no reason was recorded"]
        cautions.append(f"A newer version, {refused['version']} (task “{refused['task']}”), was "
                     f"refused by the gate and is not in use: {'; '.join(reasons)}.")
    bad = len(facts.bad_images)
    if bad:
        cautions.append(f"{bad} unreadable {'image was' if bad == 1 else 'images were'} left out.")
    tested = [task.get("test_images") or 0 for task in facts.details]
    if all(tested) and min(tested) < 500:
        cautions.append(f"The smallest test set has {min(tested)} images, so one image is "
                     f"{in_points(1 / min(tested))}; small differences may be chance.")
    if facts.result.get("seed") is not None:
        cautions.append(f"One run with one seed ({facts.result['seed']}); another seed would give "
                     "slightly different numbers.")
    return tuple(cautions)
