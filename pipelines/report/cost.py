"""The report's sections on training and its cost: curves, seconds, bytes, frozen computation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partialhn.numbers import duration, percent, size
from pipelines.report import charts
from pipelines.report.charts import Bar, Line
from pipelines.report.facts import Facts, dig
from pipelines.report.html import data_table, figure, key, pair, section

STAGES = {"startup": "startup", "data": "data", "trunk": "trunk", "features": "features",
          "train": "tasks", "register": "register"}
"""The stages of a run in their order, as `result.json` and as reports name them. The stage of the
tasks is more than training: it tests every task after each one, with every strategy."""
IN_A_ROW = 10
"""Up to this many tasks their training curves stand side by side; beyond, on top of each other."""
POINTS_A_CHART = 3000

Records = Sequence[Mapping[str, Any]]


def training(facts: Facts) -> str:
    """Loss and accuracy by epoch; nothing where no epoch was recorded."""
    tasks = _epochs_by_task(facts)
    if not tasks:
        return ""
    total = sum(len(records) for records in tasks.values())
    how = ("thin lines are single tasks, bold ones the mean over all tasks" if len(tasks) > IN_A_ROW
           else "dotted lines separate the tasks" if len(tasks) > 1 else "one task")
    loss = _curves(facts, tasks, "loss", "l-val")
    learned = _curves(facts, tasks, "accuracy", "l-train")
    held_out = _curves(facts, tasks, "validation_accuracy", "l-val")
    figures = []
    if loss:
        top = max(y for line in loss for _, y in line.points)
        figures.append(figure("Training loss, epoch by epoch", _epoch_chart(
            "loss", "Training loss", loss, charts.nice_ticks(0, top), "{:.3g}", facts, tasks),
            "Cross-entropy in nats, with the penalty that protects earlier tasks. It should fall "
            "while a task is trained, and end about as low for late tasks as for early ones."))
    if learned or held_out:
        guessing = _guessing(facts, tasks)
        legend = key(*([("--mute", "training images")] if learned else []),
                     *([("--accent", "held-out images")] if held_out else []),
                     *([("--soft", "guessing")] if guessing else []))
        shown = guessing + learned + held_out
        ticks = charts.accuracy_ticks([y for line in shown for _, y in line.points])
        figures.append(figure("Accuracy while training, epoch by epoch", legend + _epoch_chart(
            "accuracy", "Accuracy while training", shown, ticks, "{:.0%}", facts, tasks),
            "A gap between the two is over-fitting: the model fits the training images better "
            "than others."))
    lead = f"{total:,} epochs in all, {total / len(tasks):.3g} a task; {how}."
    return section("Training", lead, pair(*figures), paper=False)


def _guessing(facts: Facts, tasks: Mapping[int, Records]) -> list[Line]:
    """The accuracy of guessing: of every task, or the mean of all that lie on top of each other."""
    chance_T = facts.guessing
    if not chance_T or max(tasks) >= len(chance_T):
        return []
    if len(tasks) > IN_A_ROW:
        last = max(record["epoch"] for records in tasks.values() for record in records)
        mean = float(np.mean([chance_T[task] for task in tasks]))
        return [Line(((1.0, mean), (float(max(last, 2)), mean)), "l-chance", "",
                     f"guessing: {percent(mean)}, mean of all tasks")]
    starts = _starts(tasks)
    return [Line(((starts[task] + 0.6, chance_T[task]),
                  (starts[task] + len(records) + 0.4, chance_T[task])), "l-chance", "",
                 f"guessing: {percent(chance_T[task])}") for task, records in tasks.items()]


def _epochs_by_task(facts: Facts) -> dict[int, Records]:
    tasks: dict[int, list[Mapping[str, Any]]] = {}
    known = [e for e in facts.result.get("epochs") or [] if e.get("epoch") is not None]
    for record in sorted(known, key=lambda e: (e.get("task_index") or 0, e["epoch"])):
        tasks.setdefault(record.get("task_index") or 0, []).append(record)
    return dict(tasks)


def _starts(tasks: Mapping[int, Records]) -> dict[int, int]:
    """Number of epochs before each task."""
    starts, at = {}, 0
    for task, records in tasks.items():
        starts[task], at = at, at + len(records)
    return starts


def _epoch_chart(name: str, title: str, lines: Sequence[Line], y_ticks: Sequence[float],
                 tick_format: str, facts: Facts, tasks: Mapping[int, Records]) -> str:
    if 1 < len(tasks) <= IN_A_ROW:
        starts = _starts(tasks)
        x_ticks = [(starts[task] + (len(records) + 1) / 2, str(facts.numbers[task]))
                   for task, records in tasks.items()]
        return charts.line_chart(name, title, f"{title} by epoch, one stretch a task.", lines,
                                 y_ticks, tick_format, x_ticks, "task",
                                 borders=[start + 0.5 for start in list(starts.values())[1:]])
    last = max(record["epoch"] for records in tasks.values() for record in records)
    step = charts.tick_step(last)
    x_ticks = [(float(e), str(e)) for e in sorted({1, *range(step, last + 1, step)})
               if e != 1 or step < 5 or last <= 12]
    return charts.line_chart(name, title, f"{title} by epoch of a task.",
                             lines, y_ticks, tick_format, x_ticks, "epoch of the task")


def _curves(facts: Facts, tasks: Mapping[int, Records], field: str,
            css: str) -> list[Line]:
    stacked = len(tasks) > IN_A_ROW
    starts = _starts(tasks)
    total = sum(len(records) for records in tasks.values())
    step = max(1, total // POINTS_A_CHART)
    lines, by_epoch = [], dict[int, list[float]]()
    for task, records in tasks.items():
        known = [(record["epoch"], float(record[field])) for record in records
                 if record.get(field) is not None and math.isfinite(record[field])]
        if not known:
            continue
        for epoch, value in known:
            by_epoch.setdefault(epoch, []).append(value)
        offset = 0 if stacked else starts[task]
        spots = tuple((float(offset + epoch), value)
                      for epoch, value in [*known[:-1:step], known[-1]])
        name = facts.tasks[task] if task < len(facts.tasks) else str(task)
        lines.append(Line(spots, f"{css} thin" if stacked else css, "",
                          f"{name}: {field.replace('_', ' ')} from {known[0][1]:.3f} to "
                          f"{known[-1][1]:.3f}"))
    if lines and stacked:
        mean = tuple((float(e), float(np.mean(by_epoch[e]))) for e in sorted(by_epoch))
        lines.append(Line(mean, f"{css} bold", "", f"mean {field.replace('_', ' ')} of all tasks"))
    return lines


def cost(facts: Facts) -> str:
    """Seconds, bytes and the frozen share; nothing where none of them was measured."""
    figures = [drawn for drawn in (_stage_figure(facts), _per_task_figure(facts),
                                   _frozen_figure(facts), _bytes_table(facts)) if drawn]
    if not figures:
        return ""
    total, peak = dig(facts.result, "seconds", "total"), facts.result.get("peak_rss_bytes")
    lead = "Time, memory and computation of the run."
    if total is not None:
        call = "last pass" if facts.result.get("of_pass") else "call that wrote this result"
        lead = (f"The {call} took {duration(total)}"
                + (f" and at most {size(peak)} of memory." if peak else "."))
    if facts.result.get("images_decoded") == 0:
        lead += " The features were stored by an earlier run, so no image was decoded."
    return section("Cost", lead, *[pair(*figures[k:k + 2])
                                           for k in range(0, len(figures), 2)])


def _stage_figure(facts: Facts) -> str:
    stages = dig(facts.result, "seconds", "stages") or {}
    known = [(STAGES.get(name, name), float(stages[name])) for name in
             [*STAGES, *[other for other in stages if other not in STAGES]]
             if stages.get(name) is not None]
    if not known:
        return ""
    whole = max(sum(value for _, value in known), 1e-9)
    bars = [Bar(name, ((value, "b-main"),), f"{duration(value)} · {percent(value / whole, 0)}",
                f"{name}: {value:.2f} s") for name, value in known]
    drawing = charts.bar_chart("stages", "Seconds per stage", ", ".join(
        f"{name} {duration(value)}" for name, value in known), bars,
        max(value for _, value in known), right=128)
    tasks, own = dict(known).get(STAGES["train"], 0.0), facts.ours.seconds
    beside = own is not None and tasks > 1.05 * own
    others = " the other strategies," if facts.baselines else ""
    return figure("Time per stage", drawing, "Start-up, data, trunk and features are paid once "
                  "for the stream; tasks and register with every task."
                  + (f" {duration(own)} of the tasks' time were our training; the rest were{others}"
                     " the tests after each task and the start of the workers."
                     if beside else ""))


def _per_task_figure(facts: Facts) -> str:
    rows = dig(facts.result, "seconds", "per_task") or []
    if not rows:
        return ""
    parts = [(name, css) for name, css in (("train", "b-main"), ("evaluate", "b-second"),
                                           ("register", "b-third"))
             if any(row.get(name) for row in rows)]
    if not parts:
        return ""
    bars = [Bar(str(row.get("name")), tuple((float(row.get(name) or 0), css)
                                            for name, css in parts), "",
                f"{row.get('name')}: " + ", ".join(f"{name} {row.get(name) or 0:.2f} s"
                                                   for name, _ in parts)) for row in rows]
    drawing = charts.column_chart("per-task", "Seconds per task", f"{len(rows)} columns, one a "
                                  "task, of training, evaluating and registering.", bars,
                                  "{:.3g} s", "task")
    colours = {"train": "--accent", "evaluate": "--second", "register": "--third"}
    legend = key(*((colours[name], name) for name, _ in parts))
    return figure("Time per task", legend + drawing, "Training should not grow along the stream; "
                  "evaluating does, since every known task is tested again.")


def _frozen_figure(facts: Facts) -> str:
    trunk, head = dig(facts.result, "macs", "trunk"), dig(facts.result, "macs", "head")
    if trunk is None or head is None or trunk + head <= 0:
        return ""
    share = dig(facts.result, "macs", "frozen_share")
    share = trunk / (trunk + head) if share is None else share
    frozen, rest = percent(share, 0), percent(1 - share, 0)
    bars = [Bar("trunk, frozen", ((trunk, "b-mute"),), f"{trunk / 1e6:.3g} M · {frozen}",
                f"{trunk:,.0f} multiply-adds an image, once"),
            Bar("head, generated", ((head, "b-main"),), f"{head / 1e6:.3g} M · {rest}",
                f"{head:,.0f} multiply-adds an image, every epoch")]
    drawing = charts.bar_chart("frozen", "Share of frozen computation", f"{frozen} of an "
                               "image's multiply-adds are in the frozen trunk.", bars,
                               max(trunk, head), right=104)
    return figure("Computation per image, in millions of multiply-adds", drawing,
                  f"The frozen {frozen} of the network runs once per image and view, and its "
                  "result is stored; an epoch computes the rest alone.")


def _bytes_table(facts: Facts) -> str:
    result = facts.result
    rows = [[f"{label}<small>{note}</small>", size(result[field])] for label, note, field in (
        ("Stored features", "can be deleted and computed again", "feature_bytes"),
        ("Checkpoint", "everything prediction needs, all tasks", "checkpoint_bytes"),
        ("Trunk", "frozen; part of the checkpoint", "trunk_bytes"),
        ("Shared by all tasks", "part of the checkpoint", "shared_bytes"),
        ("Each new task", "what the checkpoint grows by", "bytes_per_task"),
    ) if result.get(field) is not None]
    if not rows:
        return ""
    return f"<div><h3>Bytes on disk</h3>{data_table(['', 'Size'], rows)}</div>"
