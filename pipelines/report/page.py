"""The report: one self-contained HTML page about a stream, and its short form for the terminal.

The page needs no network, no script and no font of its own. Numbers come from `facts`,
drawings from `charts`; here they become sections, in the order a decision-maker reads:
verdict, headline numbers, tasks, examples, task by task, baselines, training, cost, how to use it,
provenance.
Every text that came from outside (stream, task and class names) is escaped where it is printed.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from partialhn.errors import InputError
from partialhn.numbers import UNKNOWN, date, duration, percent, points, size
from pipelines.report import provenance
from pipelines.report.auto import without_id
from pipelines.report.charts import escape
from pipelines.report.cost import cost, training
from pipelines.report.examples import examples
from pipelines.report.facts import FORGETTING_LIMIT, GAP_LIMIT, Facts, read_facts
from pipelines.report.html import page
from pipelines.report.judged import Judged, judge, mean_interval
from pipelines.report.sure import interval_in_percent
from pipelines.report.tasks import baselines, task_by_task, tasks_table
from pipelines.report.text import text_summary
from pipelines.report.verdict import verdict

__all__ = ["render", "text_summary", "write_page", "write_report"]

MARKS = {"good": "✓ Good enough to ship", "fair": "△ Good enough to ship, at a cost",
         "bad": "✕ Not good enough to ship", "unknown": "? Cannot be judged"}


def render(result: Mapping[str, Any]) -> str:
    """The whole report of one `result.json` as HTML text.

    Raises: InputError when the result holds no usable accuracy matrix.
    """
    facts = read_facts(result)
    judged = judge(facts)
    parts = [_header(facts), _verdict(facts), _headline(facts, judged),
             tasks_table(facts, judged), examples(facts), task_by_task(facts), baselines(facts),
             without_id(facts), training(facts), cost(facts), provenance.usage(facts),
             provenance.configuration(facts), provenance.terms()]
    return page(f"{facts.name} – continual-learning report", parts)


def write_report(result: Mapping[str, Any], path: str | Path) -> Path:
    """Writes the report of a result to `path`. Raises: InputError when it cannot be written."""
    return write_page(render(result), path)


def write_page(html: str, path: str | Path) -> Path:
    """Writes a page in one step: a reader sees the old one or the new one.

    Raises: InputError when the path cannot be written.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(html.encode("utf-8", "replace"))
        part.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"report {str(path)!r} cannot be written: {error.strerror}; give the "
                         "path of a file in a folder you may write to") from error
    return target


def _header(facts: Facts) -> str:
    classes = len(facts.classes)
    images = sum(task.get("train_images") or 0 for task in facts.details)
    items = [f"{len(facts.tasks)} task{'s' * (len(facts.tasks) > 1)}",
             f"{classes:,} classes" if classes else "",
             f"{images:,} training images" if images else "", facts.ours.label.lower(),
             str(facts.result.get("device") or ""), date(facts.result.get("finished"))]
    return (f'<header><p class="over">partialhn · continual-learning report</p>'
            f"<h1>{escape(facts.name)}</h1>"
            f'<p class="meta">{escape(" · ".join(item for item in items if item))}</p></header>')


def _verdict(facts: Facts) -> str:
    found = verdict(facts)
    cautions = "".join(f"<li>{escape(caution)}</li>" for caution in found.cautions)
    return (f'<div class="verdict {found.status}"><p class="mark">{MARKS[found.status]}</p>'
            f"<h2>{escape(found.headline)}</h2><p>{escape(found.paragraph)}</p>"
            f'<p class="policy">Judged by the policy of the gate: {escape(found.policy)}.</p>'
            + (f"<ul>{cautions}</ul>" if cautions else "") + "</div>")


def _headline(facts: Facts, judged: Sequence[Judged]) -> str:
    interval, gap, summary = mean_interval(judged), facts.gap, facts.metrics
    behind, chance = facts.behind_heads, facts.chance
    limit, gap_limit = (f"{points(most)} pt" for most in (FORGETTING_LIMIT, GAP_LIMIT))
    rows = [
        ("Accuracy at the end", percent(summary.accuracy),
         "mean over all tasks" if interval is None else interval_in_percent(*interval), False),
        ("Above guessing", UNKNOWN if chance is None else f"{points(summary.accuracy - chance)} pt",
         "classes unknown" if chance is None else f"guessing gets {percent(chance)}", False),
        ("Forgetting", f"{points(summary.forgetting)} pt", f"mean of earlier tasks; limit {limit}"
         if len(facts.tasks) > 1 else "one task: nothing to forget",
         summary.forgetting > FORGETTING_LIMIT + 1e-9),
        ("Behind separate heads", UNKNOWN if gap is None else f"{points(gap)} pt",
         "not trained" if gap is None else f"limit {gap_limit}" if behind is None else
         f"95 % interval {points(behind.low)} to {points(behind.high)}; limit {gap_limit}",
         gap is not None and gap > GAP_LIMIT + 1e-9),
        ("Time per new task", duration(facts.task_seconds), "train, evaluate, register", False),
        ("Size per new task", size(facts.result.get("bytes_per_task")), "added to the model",
         False),
    ]
    return '<dl class="tiles">' + "".join(
        f'<div><dt>{label}</dt><dd class="value{" over-limit" if hit else ""}">{value}</dd>'
        f'<dd class="note">{note}</dd></div>' for label, value, note, hit in rows) + "</dl>"
