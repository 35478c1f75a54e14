"""The report: one self-contained HTML page about a stream, and its short form for the terminal.

The page needs no network, no script and no font of its own. Numbers come from `report_facts`,
drawings from `report_charts`; here they become sections, in the order a decision-maker reads:
verdict, headline numbers, task by task, bounds, training, cost, how to use it, provenance.
Every text that came from outside (stream, task and class names) is escaped where it is printed.
"""

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from partialhn.errors import InputError
from pipelines import report_charts as charts
from pipelines import report_provenance as provenance
from pipelines.report_charts import Bar, Line, escape, shorten
from pipelines.report_facts import (
    FORGETTING_LIMIT,
    GAP_LIMIT,
    Facts,
    break_even,
    dig,
    duration,
    percent,
    points,
    read_facts,
    size,
    verdict,
)
from pipelines.report_html import data_table, figure, key, pair, section
from pipelines.report_text import text_summary

__all__ = ["render", "text_summary", "write_report"]

STAGES = ("startup", "data", "trunk", "features", "train", "evaluate", "register")
MARKS = {"good": "✓ Holds", "fair": "△ Costs accuracy", "bad": "✕ Not good enough"}
NAMED_LINES = 8
"""Up to this many tasks every line of a chart has its own colour and label."""
LISTED_BARS = 25
POINTS_A_CHART = 3000


def render(result: Mapping[str, Any]) -> str:
    """The whole report of one `result.json` as HTML text.

    Raises: InputError when the result holds no usable accuracy matrix.
    """
    facts = read_facts(result)
    parts = [_header(facts), _verdict(facts), _headline(facts), _task_by_task(facts),
             _bounds(facts), _training(facts), _cost(facts), provenance.usage(facts),
             provenance.configuration(facts), provenance.terms()]
    template = resources.files("pipelines").joinpath("report_template.html")
    return Template(template.read_text(encoding="utf-8")).substitute(
        title=escape(f"{facts.name} – continual-learning report"), body="\n".join(parts),
        categorical="\n".join(f".l-{i} {{ stroke: var(--c{i}); }} .l-{i}-f, .l-{i}-t "
                              f"{{ fill: var(--c{i}); }}" for i in range(NAMED_LINES)),
        heat_classes="\n".join(f".h{i} {{ fill: var(--h{i}); }} .t{i} "
                               f"{{ fill: var(--{'lo' if i <= 5 else 'hi'}); }}"
                               for i in range(charts.HEAT_BINS)))


def write_report(result: Mapping[str, Any], path: str | Path) -> Path:
    """Writes the report to `path` in one step: a reader sees the old page or the new one.

    Raises: InputError when the path cannot be written.
    """
    page, target = render(result), Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(page.encode("utf-8", "replace"))
        part.replace(target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"report {str(path)!r} cannot be written: {error.strerror}; give the "
                         "path of a file in a folder you may write to") from error
    return target


def _header(facts: Facts) -> str:
    classes = sum(len(task.get("classes") or ()) for task in facts.details)
    images = sum(task.get("train_images") or 0 for task in facts.details)
    items = [f"{len(facts.tasks)} task{'s' * (len(facts.tasks) > 1)}",
             f"{classes} classes" if classes else "",
             f"{images:,} training images" if images else "", facts.ours.label.lower(),
             str(facts.result.get("device") or "")]
    return (f'<header><p class="over">partialhn · continual-learning report</p>'
            f"<h1>{escape(facts.name)}</h1>"
            f'<p class="meta">{escape(" · ".join(item for item in items if item))}</p></header>')


def _verdict(facts: Facts) -> str:
    said = verdict(facts)
    cautions = "".join(f"<li>{escape(caution)}</li>" for caution in said.cautions)
    return (f'<div class="verdict {said.status}"><p class="mark">{MARKS[said.status]}</p>'
            f"<h2>{escape(said.headline)}</h2><p>{escape(said.paragraph)}</p>"
            + (f"<ul>{cautions}</ul>" if cautions else "") + "</div>")


def _headline(facts: Facts) -> str:
    error, gap, summary = facts.standard_error, facts.gap, facts.metrics
    rows = [
        ("Accuracy at the end", percent(summary.accuracy),
         f"± {points(error)} from the finite test sets" if error is not None else
         "mean over all tasks", False),
        ("Accuracy when learned", percent(summary.learning_accuracy),
         "mean, each task right after its training", False),
        ("Forgotten", f"{points(summary.forgetting)} pt", "mean of earlier tasks; limit 1.0 pt"
         if len(facts.tasks) > 1 else "one task: nothing to forget",
         summary.forgetting > FORGETTING_LIMIT + 1e-9),
        ("Behind separate heads", "–" if gap is None else f"{points(gap)} pt",
         "not trained beside it" if gap is None else "minus: ahead; limit 2.0 pt" if gap < 0 else
         "limit 2.0 pt", gap is not None and gap > GAP_LIMIT + 1e-9),
        ("Time per new task", duration(facts.task_seconds), "train, evaluate, register", False),
        ("Size per new task", size(facts.ours.bytes_per_task), "added to the model", False),
    ]
    return '<dl class="tiles">' + "".join(
        f'<div><dt>{label}</dt><dd class="value{" over-limit" if hit else ""}">{value}</dd>'
        f'<dd class="note">{note}</dd></div>' for label, value, note, hit in rows) + "</dl>"


def _task_by_task(facts: Facts) -> str:
    n_tasks, summary = len(facts.tasks), facts.metrics
    if n_tasks == 1:
        return section("Task by task", "With one task there is no order of learning to show and "
                       "nothing to forget; both appear with the second task.", _task_table(facts))
    lead = (f"Right after its own training a task is at {percent(summary.learning_accuracy)} on "
            f"average; once all {n_tasks} are learned, at {percent(summary.accuracy)}.")
    heat = _heat_figure(facts)
    lines, lost, listing = _line_figure(facts), _forgotten_figure(facts), _task_table(facts)
    if n_tasks <= 10:
        return section("Task by task", lead, pair(heat, lines), pair(lost, listing))
    listing = f"<details><summary>All {n_tasks} tasks as a table</summary>{listing}</details>"
    return section("Task by task", lead, f'<div class="wide">{heat}</div>', pair(lines, lost),
                   listing)


def _heat_figure(facts: Facts) -> str:
    table_TT, n_tasks = facts.accuracy_TT, len(facts.tasks)
    drawing = charts.heat_map(
        "matrix", facts.tasks, table_TT,
        f"Row i, column j: accuracy on task j after training task i. {n_tasks} tasks; values from "
        f"{percent(float(np.nanmin(table_TT)))} to {percent(float(np.nanmax(table_TT)))}.")
    css = "" if n_tasks <= 10 else "scroll" if n_tasks <= charts.WITH_TEXT else "picture"
    return figure("Accuracy on every task after every task, in per cent", drawing,
                  "A column shows one task through time, from the diagonal (just learned) down to "
                  "the last row (now). An even column means nothing was lost.", css,
                  min_width=96 + 30 * n_tasks if css == "scroll" else 0)


def _line_figure(facts: Facts) -> str:
    table_TT, n_tasks = facts.accuracy_TT, len(facts.tasks)
    drops = facts.metrics.forgetting_per_task
    worst = int(np.argmax(drops))
    named = n_tasks <= NAMED_LINES
    lines = []
    for j, name in enumerate(facts.tasks):
        css = f"l-{j}" if named else "l-old"
        label = shorten(charts.row_label(j, name), 12) if named else ""
        if not named and j == worst and drops[j] > FORGETTING_LIMIT:
            css, label = "l-worst", shorten(charts.row_label(j, name), 12)
        lines.append(Line(tuple((float(i), float(table_TT[i, j])) for i in range(j, n_tasks)), css,
                          label, f"{name}: {percent(table_TT[j, j])} when learned, "
                                 f"{percent(table_TT[-1, j])} at the end"))
    lines.sort(key=lambda line: line.css == "l-worst")
    mean = tuple((float(i), float(table_TT[i, :i + 1].mean())) for i in range(n_tasks))
    if not named:
        lines.append(Line(mean, "l-mean", "mean", "mean over the tasks learned so far"))
    every = max(1, -(-n_tasks // 12))
    drawing = charts.line_chart(
        "over-time", "Accuracy of each task over time",
        f"One line a task, starting when it is learned. The mean over learned tasks goes from "
        f"{percent(mean[0][1])} to {percent(mean[-1][1])}.", lines,
        charts.accuracy_ticks(table_TT[np.tril_indices(n_tasks)]), "{:.0%}",
        [(float(i), str(i)) for i in range(0, n_tasks, every)], "after training task", right=88)
    caption = ("A flat line is a task that is kept; a falling one is being forgotten."
               + ("" if named else " Black: mean over the tasks learned so far; orange, if any: "
                  "the task that lost most."))
    return figure("Accuracy of each task over time", drawing, caption)


def _forgotten_figure(facts: Facts) -> str:
    drops = facts.metrics.forgetting_per_task
    order = list(range(len(drops) - 1))
    rest = ""
    if len(order) > LISTED_BARS:
        order = sorted(order, key=lambda j: -drops[j])[:LISTED_BARS]
        others = [drops[j] for j in range(len(drops) - 1) if j not in order]
        rest = (f" Shown are the {LISTED_BARS} that lost most; the other {len(others)} lost "
                f"{points(max(others))} points at most.")
    bars = [Bar(charts.row_label(j, facts.tasks[j]),
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


def _best(facts: Facts, j: int) -> float:
    return float(facts.accuracy_TT[j:, j].max())


def _task_table(facts: Facts) -> str:
    rows = []
    for j, (name, task) in enumerate(zip(facts.tasks, facts.details, strict=True)):
        classes = [str(label) for label in task.get("classes") or ()]
        about = shorten(", ".join(classes[:12]) + (", …" if len(classes) > 12 else ""), 90)
        if task.get("transform") not in (None, "none"):
            about += f" · images: {task['transform']}"
        title = f"{escape(charts.row_label(j, name))}<small>{escape(about)}</small>"
        images = " / ".join(f"{task[part]:,}" if task.get(part) is not None else "–"
                            for part in ("train_images", "test_images"))
        rows.append([title, images, percent(facts.accuracy_TT[j, j]),
                     percent(facts.accuracy_TT[-1, j])])
    return data_table(["Task and classes", "Images: train / test", "When learned", "At the end"],
                      rows)


def _bounds(facts: Facts) -> str:
    if not facts.bounds:
        return section("Against the bounds", "No bounds were trained beside this run. Train again "
                       "with “--compare separate_heads naive” to see what sharing one model costs "
                       "in accuracy and what protecting earlier tasks is worth; the features are "
                       "found again.")
    methods = [facts.ours, *facts.bounds.values()]
    heads = ["", f'<span class="ours">{escape(facts.ours.label)}</span>',
             *[escape(method.label) for method in methods[1:]]]
    rows = [[f"{label}<small>{note}</small>", *[show(getattr(m, field)) for m in methods]]
            for label, note, field, show in (
        ("Accuracy at the end", "ACC: mean over all tasks", "acc", percent),
        ("Accuracy when learned", "LA: right after each task", "learning_accuracy", percent),
        ("Forgotten, points", "mean drop since the best", "forgetting", points),
        ("Change since learned, points", "BWT; plus is a gain", "bwt",
         lambda value: points(value, signed=True)),
        ("Size per new task", "added to the model", "bytes_per_task", size),
        ("Training time", "all tasks together", "seconds", duration))]
    lead = ("Two yardsticks on the same frozen trunk and features. Separate heads cannot forget, "
            "but every task adds a whole network head; naive fine-tuning keeps one head and "
            "protects nothing.")
    pays, shared = break_even(facts), facts.result.get("shared_bytes")
    after = ""
    if pays is not None:
        after = (f'<p class="meta" style="margin-top:14px">The part that all tasks share takes '
                 f"{size(shared)} once; with it, the whole is smaller than separate heads from "
                 f"{pays} task{'s' * (pays > 1)} on (this stream: {len(facts.tasks)}).</p>")
    return section("Against the bounds", lead, data_table(heads, rows), after)


def _training(facts: Facts) -> str:
    epochs = sorted((e for e in facts.result.get("epochs") or [] if e.get("epoch") is not None),
                    key=lambda e: (e.get("task_index") or 0, e["epoch"]))
    if not epochs:
        return ""
    spans: dict[int, list[tuple[float, Mapping[str, Any]]]] = {}
    for at, record in enumerate(epochs):
        spans.setdefault(record.get("task_index") or 0, []).append((float(at + 1), record))
    borders = [span[0][0] - 0.5 for span in list(spans.values())[1:]]
    every = max(1, -(-len(spans) // 12))
    ticks = [((span[0][0] + span[-1][0]) / 2, str(task))
             for k, (task, span) in enumerate(spans.items()) if k % every == 0]
    step = max(1, len(epochs) // POINTS_A_CHART)
    loss = _curves(facts, spans, "loss", "l-val", step)
    learned = _curves(facts, spans, "accuracy", "l-train", step)
    held_out = _curves(facts, spans, "validation_accuracy", "l-val", step)
    figures = []
    if loss:
        top = max(y for line in loss for _, y in line.points)
        figures.append(figure("Training loss, epoch by epoch", charts.line_chart(
            "loss", "Training loss", "Loss by epoch, one stretch a task.", loss,
            charts.nice_ticks(0, top), "{:.3g}", ticks, "task", borders=borders),
            "Loss including the penalty that protects earlier tasks. Every task starts anew at "
            "the left of its stretch and should fall."))
    if learned or held_out:
        ys = [y for line in learned + held_out for _, y in line.points]
        legend = key(*([("--mute", "training images")] if learned else []),
                     *([("--accent", "held-out images")] if held_out else []))
        figures.append(figure("Accuracy while training, epoch by epoch", legend + charts.line_chart(
            "accuracy", "Accuracy while training", "Accuracy by epoch, one stretch a task.",
            learned + held_out, charts.accuracy_ticks(ys), "{:.0%}", ticks, "task",
            borders=borders), "A gap between the two lines is over-fitting: what helps on the "
            "training images alone."))
    rounds = len(epochs) / len(spans)
    return section("How it trained", f"{len(epochs)} epochs in all, {rounds:.3g} a task; "
                   "dotted lines separate the tasks.", pair(*figures))


def _curves(facts: Facts, spans: Mapping[int, list[tuple[float, Mapping[str, Any]]]], field: str,
            css: str, step: int) -> list[Line]:
    lines = []
    for task, span in spans.items():
        known = [(at, float(record[field])) for at, record in span
                 if record.get(field) is not None and np.isfinite(record[field])]
        if known:
            kept = known[:-1:step] + known[-1:]
            name = facts.tasks[task] if task < len(facts.tasks) else str(task)
            lines.append(Line(tuple(kept), css, "", f"{name}: {field.replace('_', ' ')} from "
                              f"{known[0][1]:.3f} to {known[-1][1]:.3f}"))
    return lines


def _cost(facts: Facts) -> str:
    figures = [drawn for drawn in (_stage_figure(facts), _per_task_figure(facts),
                                   _frozen_figure(facts), _bytes_table(facts)) if drawn]
    if not figures:
        return ""
    total, peak = dig(facts.result, "seconds", "total"), facts.result.get("peak_rss_bytes")
    lead = f"The whole run took {duration(total)}" if total is not None else "What the run took"
    lead += f" and at most {size(peak)} of memory." if peak else "."
    if facts.result.get("images_decoded") == 0:
        lead += " The features were found from an earlier run, so no image was decoded."
    return section("What it cost", lead, *[pair(*figures[k:k + 2])
                                           for k in range(0, len(figures), 2)])


def _stage_figure(facts: Facts) -> str:
    stages = dig(facts.result, "seconds", "stages") or {}
    known = [(name, float(stages[name])) for name in
             [*STAGES, *[other for other in stages if other not in STAGES]]
             if stages.get(name) is not None]
    if not known:
        return ""
    whole = max(sum(value for _, value in known), 1e-9)
    bars = [Bar(name, ((value, "b-main"),), f"{duration(value)} · {value / whole:.0%}",
                f"{name}: {value:.2f} s") for name, value in known]
    drawing = charts.bar_chart("stages", "Seconds per stage", ", ".join(
        f"{name} {duration(value)}" for name, value in known), bars,
        max(value for _, value in known), right=104)
    return figure("Time per stage", drawing, "Start-up, data, trunk and features are paid once "
                  "for the stream; train, evaluate and register with every task.")


def _per_task_figure(facts: Facts) -> str:
    rows = dig(facts.result, "seconds", "per_task") or []
    if not rows:
        return ""
    parts = (("train", "b-main"), ("evaluate", "b-second"), ("register", "b-third"))
    bars = [Bar(str(row.get("name")), tuple((float(row.get(name) or 0), css)
                                            for name, css in parts), "",
                f"{row.get('name')}: " + ", ".join(f"{name} {row.get(name) or 0:.2f} s"
                                                   for name, _ in parts)) for row in rows]
    drawing = charts.column_chart("per-task", "Seconds per task", f"{len(rows)} columns, one a "
                                  "task, of training, evaluating and registering.", bars,
                                  "{:.3g} s", "task")
    legend = key(("--accent", "train"), ("--second", "evaluate"), ("--third", "register"))
    return figure("Time per task", legend + drawing, "Training should not grow along the stream; "
                  "evaluating does, since every known task is tested again.")


def _frozen_figure(facts: Facts) -> str:
    trunk, head = dig(facts.result, "macs", "trunk"), dig(facts.result, "macs", "head")
    if trunk is None or head is None or trunk + head <= 0:
        return ""
    share = dig(facts.result, "macs", "frozen_share")
    share = trunk / (trunk + head) if share is None else share
    bars = [Bar("trunk, frozen", ((trunk, "b-mute"),), f"{trunk / 1e6:.3g} M · {share:.0%}",
                f"{trunk:,.0f} multiply-adds an image, once"),
            Bar("head, generated", ((head, "b-main"),), f"{head / 1e6:.3g} M · {1 - share:.0%}",
                f"{head:,.0f} multiply-adds an image, every epoch")]
    drawing = charts.bar_chart("frozen", "Share of frozen computation", f"{share:.0%} of an "
                               "image's multiply-adds are in the frozen trunk.", bars,
                               max(trunk, head), right=104)
    return figure("Computation per image, in millions of multiply-adds", drawing,
                  f"The frozen {share:.0%} of the network runs once per image and view, and its "
                  "result is stored; every epoch pays for the rest alone.")


def _bytes_table(facts: Facts) -> str:
    result = facts.result
    rows = [[f"{label}<small>{note}</small>", size(result[field])] for label, note, field in (
        ("Stored features", "can be deleted and computed again", "feature_bytes"),
        ("Checkpoint", "everything prediction needs, all tasks", "checkpoint_bytes"),
        ("of it: trunk", "frozen, shared", "trunk_bytes"),
        ("of it: shared generator", "shared by all tasks", "shared_bytes"),
        ("of it: each new task", "grows with the stream", "bytes_per_task"),
    ) if result.get(field) is not None]
    if not rows:
        return ""
    return f"<div><h3>Bytes on disk</h3>{data_table(['', 'Size'], rows)}</div>"
