"""The report's sections on accuracy: every task over time, forgetting, and the baselines."""

from collections.abc import Sequence

import numpy as np

from partialhn.numbers import UNKNOWN, counted, duration, in_points, percent, points, size
from pipelines.report import charts
from pipelines.report.charts import Bar, Line, escape, shorten
from pipelines.report.facts import FORGETTING_LIMIT, Facts, break_even
from pipelines.report.html import NAMED_LINES, data_table, figure, pair, section
from pipelines.report.judged import Judged
from pipelines.report.sure import missing

LISTED_BARS = 25
DRAWN = 100
"""Most tasks of which the lines over time are drawn."""
LISTED_IMAGES = 100
LISTED_TASKS = 12
"""Tasks that the table shows before it is unfolded."""


def tasks_table(facts: Facts, judged: Sequence[Judged]) -> str:
    """Every task with its accuracy, guessing, ridge regression and the gate's answer."""
    refused = sum(each.refused for each in judged)
    lead = ("“At the end” is the accuracy on a task's test images now, with its 95 % interval. "
            "“Ridge” is ridge regression on the same features, which needs no training. ")
    lead += (f"The gate would refuse {refused} of {len(judged)} tasks." if refused else
             "The gate would refuse none." if all(each.decision for each in judged) else "")
    table = _task_table(facts, judged)
    if len(facts.tasks) <= LISTED_TASKS:
        return section("The tasks", lead, table, _bad_images(facts))
    order = sorted(range(len(judged)), key=lambda j: (not judged[j].refused, _margin(judged[j])))
    first = sorted(order[:LISTED_TASKS])
    lead += f" Listed first are the {LISTED_TASKS} with the least accuracy above guessing."
    return section("The tasks", lead, _task_table(facts, judged, first),
                   f"<details><summary>All {len(facts.tasks)} tasks as a table</summary>{table}"
                   "</details>", _bad_images(facts))


def _margin(task: Judged) -> float:
    return task.accuracy - (task.chance or 0.0)


def task_by_task(facts: Facts) -> str:
    """The accuracy matrix, its columns as lines, and the forgetting."""
    n_tasks, summary = len(facts.tasks), facts.metrics
    if n_tasks == 1:
        return section("Over time", "With one task there is no order of learning to show and "
                       "nothing to forget; both appear with the second task.")
    lead = (f"The mean accuracy of a task is {percent(summary.learning_accuracy)} right after its "
            f"own training, and {percent(summary.accuracy)} once all {n_tasks} are learned.")
    heat, lines, lost = _heat_figure(facts), _line_figure(facts), _forgotten_figure(facts)
    if n_tasks <= 10:
        return section("Over time", lead, pair(heat, f"<div>{lines}{lost}</div>"))
    if n_tasks > charts.WITH_TEXT:
        return section("Over time", lead, pair(f"<div>{heat}{lines}</div>", lost))
    return section("Over time", lead, f'<div class="wide">{heat}</div>', pair(lines, lost))


def _heat_figure(facts: Facts) -> str:
    table_TT, n_tasks = facts.accuracy_TT, len(facts.tasks)
    about = (f"Row i, column j: accuracy on task j after training task i. {n_tasks} tasks; values "
             f"from {percent(float(np.nanmin(table_TT)))} to "
             f"{percent(float(np.nanmax(table_TT)))}.")
    drawing = charts.heat_map("matrix", facts.tasks, table_TT, about, facts.guessing,
                              numbers=facts.numbers)
    if charts.NARROW < n_tasks <= charts.WITH_TEXT:  # the numbers need more room than a phone has
        small = charts.heat_map("matrix-small", facts.tasks, table_TT, about, facts.guessing,
                                charts.NARROW, facts.numbers)
        drawing = f'<div class="on-wide">{drawing}</div><div class="on-phone">{small}</div>'
    return figure("Accuracy on every task after every task, in per cent", drawing,
                  "A column shows one task through time, from the diagonal (just learned) down to "
                  "the last row (now). An even column means nothing was lost."
                  + (f" Each cell is the mean of up to {-(-n_tasks // charts.BLOCKS)} tasks."
                     if n_tasks > charts.WHOLE else ""))


def _line_figure(facts: Facts) -> str:
    table_TT, n_tasks = facts.accuracy_TT, len(facts.tasks)
    drops = facts.metrics.forgetting_per_task
    worst = int(np.argmax(drops))
    named = n_tasks <= NAMED_LINES
    lines, drawn = [], _drawn(facts)
    for j, name in [(j, facts.tasks[j]) for j in drawn]:
        css = f"l-{j}" if named else "l-old"
        label = shorten(facts.labels[j], 12) if named else ""
        if not named and j == worst and drops[j] > FORGETTING_LIMIT:
            css, label = "l-worst", shorten(facts.labels[j], 12)
        lines.append(Line(tuple((float(i), float(table_TT[i, j])) for i in drawn if i >= j), css,
                          label, f"{name}: {percent(table_TT[j, j])} when learned, "
                                 f"{percent(table_TT[-1, j])} at the end"))
    lines.sort(key=lambda line: line.css == "l-worst")
    mean = tuple((float(i), float(table_TT[i, :i + 1].mean())) for i in range(n_tasks))
    if not named:
        lines.append(Line(mean, "l-mean", "mean", "mean over the tasks learned so far"))
    chance_T = facts.guessing
    if chance_T:
        lines.insert(0, Line(tuple((float(i), float(np.mean(chance_T[:i + 1])))
                                   for i in range(n_tasks)), "l-chance", "guessing",
                             "guessing: mean over the tasks learned so far"))
    every = charts.tick_step(n_tasks)
    drawing = charts.line_chart(
        "over-time", "Accuracy of each task over time",
        f"One line a task, starting when it is learned. The mean over learned tasks goes from "
        f"{percent(mean[0][1])} to {percent(mean[-1][1])}.", lines,
        charts.accuracy_ticks([*table_TT[np.tril_indices(n_tasks)], *chance_T]), "{:.0%}",
        [(float(i), str(facts.numbers[i])) for i in range(0, n_tasks, every)],
        "after training task", right=98)
    caption = ("A flat line is a task that is kept; a falling one is being forgotten."
               + ("" if named else " Bold: mean over the tasks learned so far; orange, if any: "
                  "the task that lost most.") + _left_out(drawn, n_tasks))
    return figure("Accuracy of each task over time", drawing, caption)


def _drawn(facts: Facts) -> list[int]:
    """The tasks that are drawn: all, or of many some that are evenly spread, with the first, the
    last, and the one that lost most.
    """
    n_tasks = len(facts.tasks)
    if n_tasks <= DRAWN:
        return list(range(n_tasks))
    spread = np.linspace(0, n_tasks - 1, DRAWN).round().astype(int).tolist()
    return sorted({*spread, int(np.argmax(facts.metrics.forgetting_per_task))})


def _left_out(drawn: Sequence[int], n_tasks: int) -> str:
    return "" if len(drawn) == n_tasks else (
        f" Drawn are {len(drawn)} of the {n_tasks} tasks, evenly spread.")


def _forgotten_figure(facts: Facts) -> str:
    drops = facts.metrics.forgetting_per_task
    order = list(range(len(drops) - 1))
    rest = ""
    if len(order) > LISTED_BARS:
        order = sorted(order, key=lambda j: -drops[j])[:LISTED_BARS]
        others = [drops[j] for j in range(len(drops) - 1) if j not in order]
        rest = (f" Shown are the {LISTED_BARS} that lost most; the other {len(others)} lost "
                f"{points(max(others))} points at most.")
    bars = [Bar(facts.labels[j],
                ((drops[j], "b-warm" if drops[j] > FORGETTING_LIMIT else "b-second"),),
                points(drops[j]), f"{facts.tasks[j]}: best {percent(_best(facts, j))}, at the end "
                                  f"{percent(facts.accuracy_TT[-1, j])}") for j in order]
    drawing = charts.bar_chart(
        "forgotten", "What was forgotten", "Accuracy lost since the best moment, in points, for "
        f"each earlier task; the largest loss is {points(max(drops))}.", bars,
        max([*drops, 1.6 * FORGETTING_LIMIT]), (FORGETTING_LIMIT, "1 point"), right=52)
    return figure("What was forgotten, in points", drawing,
                  "Accuracy lost between a task's best moment and the end. One point is one test "
                  "image in a hundred; the mean may reach the dashed line." + rest)


def _bad_images(facts: Facts) -> str:
    if not facts.bad_images:
        return ""
    rows = [[escape(task), escape(image), escape(reason)]
            for task, image, reason in facts.bad_images[:LISTED_IMAGES]]
    more = len(facts.bad_images) - len(rows)
    note = f"<p>and {more:,} more, in result.json.</p>" if more else ""
    return (f"<details><summary>Images left out ({len(facts.bad_images):,})</summary>"
            f'<div class="scroll">{data_table(["Task", "Image", "Reason"], rows, "wrap")}</div>'
            f"{note}</details>")


def _best(facts: Facts, j: int) -> float:
    return float(facts.accuracy_TT[-1, j]) + facts.metrics.forgetting_per_task[j]


def _task_table(facts: Facts, judged: Sequence[Judged], places: Sequence[int] = ()) -> str:
    """A row for each task, or for those at some places."""
    rows = []
    for j in places or range(len(facts.tasks)):
        task, found = facts.details[j], judged[j]
        images = " / ".join(f"{task[part]:,}" if task.get(part) is not None else "–"
                            for part in ("train_images", "test_images"))
        interval = ("" if found.interval is None else
                    f'<small class="range">{points(found.interval[0])} to '
                    f"{points(found.interval[1])}</small>")
        rows.append([_title(facts, j), images, percent(facts.accuracy_TT[j, j]),
                     f"<span>{percent(found.accuracy)}{interval}</span>", percent(found.chance),
                     _ridge(found), _gate(found)])
    return data_table(["Task and classes", "Images: train / test", "When learned", "At the end",
                       "Guessing", "Ridge", "By the gate"], rows, "stack")


def _title(facts: Facts, j: int) -> str:
    task = facts.details[j]
    classes = [str(label) for label in task.get("classes") or ()]
    about = shorten(", ".join(classes[:12]) + (", …" if len(classes) > 12 else ""), 90)
    if task.get("transform") not in (None, "none"):
        about += f" · images: {task['transform']}"
    return f"{escape(facts.labels[j])}<small>{escape(about)}</small>"


def _ridge(task: Judged) -> str:
    """Ridge regression beside the head, as HTML."""
    if task.ridge is None:
        return "not measured"
    if task.ridge.solved:
        return "solved by it"
    ahead = task.ridge.ahead
    note = missing(ahead, task.ridge.images) or (
        f"{in_points(abs(ahead.mean))} {'behind' if ahead.mean > 0 else 'ahead'}, 95 % interval "
        f"{points(abs(ahead.mean) - ahead.half)} to {points(abs(ahead.mean) + ahead.half)}")
    on = "" if task.ridge.images == "test images" else "on held-out images: "
    return f"<span>{percent(task.ridge.ridge)}<small>{escape(on + note)}</small></span>"


def _gate(task: Judged) -> str:
    """The gate's answer, as HTML."""
    if task.decision is None:
        return UNKNOWN
    if not task.refused:
        return "takes it"
    text = "; ".join(task.refusals())
    if more := task.more_images():
        text += f"; {counted(more, 'more test image')} with this accuracy would pass"
    return f'<span class="limit-hit">refuses it<small>{escape(text)}</small></span>'


def baselines(facts: Facts) -> str:
    """Our strategy beside the baselines that were trained with it."""
    if not facts.baselines:
        return section("Baselines", "No baselines were trained beside this run. Train "
                       "again with “--compare separate_heads naive” to see what sharing one "
                       "model costs in accuracy and what protecting earlier tasks gains; the "
                       "stored features are used again.")
    methods = [facts.ours, *facts.baselines.values()]
    heads = ["", f'<span class="ours">{escape(facts.ours.label)}</span>',
             *[escape(method.label) for method in methods[1:]], "Guessing"]
    rows = [[f"{label}<small>{note}</small>", *[show(getattr(m, field)) for m in methods],
             percent(facts.chance) if show is percent else UNKNOWN]
            for label, note, field, show in (
        ("Accuracy at the end", "mean over all tasks", "acc", percent),
        ("Accuracy when learned", "right after each task", "learning_accuracy", percent),
        ("Forgetting, points", "mean drop from the best accuracy", "forgetting", points),
        ("Backward transfer, points", "BWT; positive is a gain", "bwt",
         lambda value: points(value, signed=True)),
        ("Size per new task", "added to the model", "bytes_per_task", size),
        ("Training time", "all tasks together", "seconds", duration))]
    lead = ("The baselines use the same frozen trunk and features. Separate heads cannot forget, "
            "but every task adds a whole network head; naive fine-tuning keeps one head and "
            "protects nothing.")
    pays, shared = break_even(facts), facts.result.get("shared_bytes")
    after = [facts.detector_adds] if facts.detector_adds else []
    if pays is not None:
        after.append(f"The part that all tasks share takes {size(shared)} once; with it, the model "
                     f"is smaller than separate heads from {pays} task{'s' * (pays > 1)} on (this "
                     f"stream: {len(facts.tasks)}).")
    return section("Baselines", lead, data_table(heads, rows, "stack"),
                   "".join(f'<p class="meta after">{sentence}</p>' for sentence in after))
