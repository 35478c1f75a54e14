"""The report's verdict: one paragraph in plain words, for a reader from outside the field.

A stream is good enough to ship if the gate would take each of its tasks with the accuracy that it
has now. What ridge regression, separate heads and forgetting say makes it dearer, not worse.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from partialhn.numbers import counted, duration, in_points, percent, points, size
from pipelines.report.facts import FORGETTING_LIMIT, GAP_LIMIT, Facts, break_even
from pipelines.report.judged import Judged, judge, mean_interval, policy_of, policy_words
from pipelines.report.sure import interval_in_percent, told

NOTICEABLE = 0.05
"""Accuracy lost on a single task that the verdict names even when the mean is good."""
NAMED = 3
"""Tasks that a sentence names; the others are counted."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict; `status` is good, fair, bad or unknown, and `cautions` limit what the numbers
    show.
    """

    status: str
    headline: str
    paragraph: str
    policy: str
    """The policy that it was judged by, in words."""
    cautions: tuple[str, ...]


def verdict(facts: Facts) -> Verdict:
    """The verdict in plain language, computed from the numbers alone."""
    judged = judge(facts)
    status, headline = _judgement(facts, judged)
    sentences = [_learned(facts, judged), _beyond_luck(judged), _beside_ridge(judged),
                 _kept(facts), _against_baselines(facts), _cost(facts)]
    return Verdict(status, headline, " ".join(s for s in sentences if s),
                   policy_words(policy_of(facts.result)), _cautions(facts, judged))


def _judgement(facts: Facts, judged: Sequence[Judged]) -> tuple[str, str]:
    """Status and headline."""
    count, worst = _tasks(len(facts.tasks)), _worst(facts)
    lucky = [each for each in judged if each.lucky]
    refused = [each for each in judged if each.refused]
    behind = _behind_ridge(judged)
    drop = facts.metrics.forgetting_per_task[worst]
    if len(lucky) == len(judged):
        return "bad", "It did not learn: guessing explains its accuracy on every task."
    if lucky:
        return "bad", (f"{len(lucky)} of {count} may be luck: the gate would refuse "
                       f"{_named(lucky)}.")
    if refused and all(each.best > each.accuracy for each in refused):
        return "bad", f"It learned {count}, but forgets: the gate would refuse {_named(refused)}."
    if refused:
        return "bad", f"The gate would refuse {_named(refused)}."
    if any(each.decision is None for each in judged):
        return "unknown", ("It cannot be judged: the result does not say how many test images or "
                           "classes each task has.")
    if facts.metrics.forgetting > FORGETTING_LIMIT + 1e-9:
        return "fair", f"It learned {count}, but forgets the earlier ones."
    if behind:
        return "fair", ("Ridge regression, which needs no training, is better on "
                        f"{_named(behind)}.")
    if facts.gap is not None and facts.gap > GAP_LIMIT + 1e-9:
        return "fair", "It remembers its tasks, but is less accurate than separate heads."
    if drop > NOTICEABLE:
        return "fair", f"It learned {count}, but task “{facts.tasks[worst]}” lost noticeably."
    if len(facts.tasks) == 1:
        return "good", "It learned its first task; nothing could be forgotten yet."
    return "good", f"It learned {count} and still remembers all of them."


def _behind_ridge(judged: Sequence[Judged]) -> list[Judged]:
    return [each for each in judged
            if each.ridge and each.ridge.ahead.tells and each.ridge.ahead.mean < 0]


def _named(tasks: Sequence[Judged]) -> str:
    """Some tasks by name: task “a” and 2 others."""
    names = [f"“{each.task}”" for each in tasks[:NAMED]]
    rest = len(tasks) - len(names)
    word = "task" if len(tasks) == 1 else "tasks"
    return f"{word} {', '.join(names)}" + (f" and {rest} more" if rest else "")


def _worst(facts: Facts) -> int:
    return int(np.argmax(facts.metrics.forgetting_per_task))


def _tasks(n: int) -> str:
    return "1 task" if n == 1 else f"{n} tasks"


def _learned(facts: Facts, judged: Sequence[Judged]) -> str:
    classes = len(facts.classes)
    what = _tasks(len(facts.tasks)) + (" one after another" if len(facts.tasks) > 1 else "")
    what += f" ({classes:,} classes in all)" if classes else ""
    again = " without going back to the images of earlier ones" if len(facts.tasks) > 1 else ""
    interval = mean_interval(judged)
    sure = f" ({interval_in_percent(*interval)})" if interval else ""
    guess = f"; guessing would get {percent(facts.chance)}" if facts.chance is not None else ""
    return (f"The model learned {what}{again}. When the task of an image is given, it predicts "
            f"the right class for {percent(facts.metrics.accuracy)} of test images{sure}{guess}.")


def _beyond_luck(judged: Sequence[Judged]) -> str:
    if any(each.decision is None for each in judged):
        return ""
    lucky = [each for each in judged if each.lucky]
    if not lucky:
        return ("No task's accuracy is explained by luck." if len(judged) > 1 else
                "Luck does not explain its accuracy.")
    text = f"Luck may explain {_named(lucky)}"
    more = [(each, found) for each in lucky if (found := each.more_images())]
    if more:
        each, found = more[0]
        text += (f"; with the same accuracy {counted(found, 'more test image')} of task "
                 f"“{each.task}” would tell")
    return text + "."


def _beside_ridge(judged: Sequence[Judged]) -> str:
    """Ridge regression beside the heads, task by task."""
    known = [each.ridge for each in judged if each.ridge]
    if not known:
        return ("" if any(each.decision is None for each in judged) else
                "Ridge regression was not measured beside it.")
    solved = [each for each in known if each.solved]
    others = [each for each in known if not each.solved]
    better = [each for each in others if each.ahead.tells and each.ahead.mean > 0]
    worse = _behind_ridge(judged)
    parts = [f"better on {_tasks(len(better))}"] if better else []
    if worse:
        first = max(worse, key=lambda each: -each.ridge.ahead.mean if each.ridge else 0)
        assert first.ridge is not None
        parts.append(f"worse on {_named(worse)} (“{first.task}” by "
                     f"{told(first.ridge.ahead, first.ridge.images)})")
    unclear = len(others) - len(better) - len(worse)
    parts += [f"level within the error of its images on {_tasks(unclear)}"] if unclear else []
    text = ""
    if parts:
        text = ("Beside ridge regression on the same features, which needs no training, it is "
                + ", ".join(parts) + ".")
    if solved:
        text += (f" {_tasks(len(solved))} {'is' if len(solved) == 1 else 'are'} solved by ridge "
                 "regression in closed form: few images, or training did no better.")
    return text.strip()


def _kept(facts: Facts) -> str:
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
    if facts.metrics.forgetting > FORGETTING_LIMIT + 1e-9:
        return (f"It forgets: earlier tasks {lost}, {most}. This is more than the 1 point that "
                "counts as acceptable here, so check earlier tasks before relying on them.")
    return f"Earlier tasks still work: they {lost}, {most}."


def _against_baselines(facts: Facts) -> str:
    sentences = []
    gap, naive = facts.gap, facts.baselines.get("naive")
    if gap is not None:
        reach = ("A separate head for every task, which cannot forget, reaches "
                 f"{percent(facts.metrics.accuracy + gap)}")
        if gap > GAP_LIMIT + 1e-9:
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
    if facts.detector_adds:
        cost += f" {facts.detector_adds}"
    pays = break_even(facts)
    if pays is not None:
        cost += (f" With the part that all tasks share, the model is smaller than separate "
                 f"heads from {_tasks(pays)} on.")
    return cost


def _cautions(facts: Facts, judged: Sequence[Judged]) -> tuple[str, ...]:
    cautions = [f"Task “{each.task}” would be refused: {'; '.join(each.refusals())}."
                for each in judged if each.refused][:NAMED]
    cautions += [f"Task “{task}”: {text}." for task, text in facts.doubts][:NAMED]
    cautions += [f"{note[:1].upper()}{note[1:]}." for note in facts.notes]
    if refused := facts.result.get("challenger"):
        reasons = (refused.get("decision") or {}).get("reasons") or ["no reason was recorded"]
        cautions.append(f"A newer version, {refused['version']} (task “{refused['task']}”), was "
                     f"refused by the gate and is not in use: {'; '.join(reasons)}.")
    bad = len(facts.bad_images)
    if bad:
        cautions.append(f"{bad} unreadable {'image was' if bad == 1 else 'images were'} left out.")
    tested = [task.get("test_images") or 0 for task in facts.details]
    if all(tested) and min(tested) < 500:
        cautions.append(f"The smallest test set has {counted(min(tested), 'image')}, so one image "
                        f"is {in_points(1 / min(tested))}; small differences may be chance.")
    if facts.result.get("seed") is not None:
        cautions.append(f"One run with one seed ({facts.result['seed']}): the intervals count the "
                        "test images, not how much another seed would change.")
    return tuple(cautions)
