"""The short table a training run ends with, at most 100 columns wide."""

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from partialhn.numbers import UNKNOWN, duration, in_points, percent, size
from pipelines.report.auto import without_id_line
from pipelines.report.charts import shorten
from pipelines.report.cost import STAGES
from pipelines.report.facts import Facts, dig, read_facts
from pipelines.report.judged import judge, mean_interval
from pipelines.report.sure import interval_in_percent

COLUMNS = 100
NBSP = "\u00a0"
PLAIN = str.maketrans({NBSP: " ", "−": "-", "–": "-", "…": "~"})
"""Our own signs in ASCII, for terminals without UTF-8."""
WHOLE_MATRIX = 12
"""Up to this many tasks the whole accuracy matrix fits."""


def text_summary(result: Mapping[str, Any]) -> str:
    """The accuracy, forgetting, baselines, seconds and bytes of a stream as plain text.

    Beyond 12 tasks the matrix is compressed to its diagonal and its last row.
    Raises: InputError when the result holds no usable accuracy matrix.
    """
    facts = read_facts(result)
    n_classes = len(facts.classes)
    head = [_clean(facts.name), f"{len(facts.tasks)} task{'s' * (len(facts.tasks) > 1)}"]
    head += [f"{n_classes} classes"] if n_classes else []
    head += [f"seed {result['seed']}"] if result.get("seed") is not None else []
    blocks = [[shorten(", ".join(head), COLUMNS)],
              _matrix(facts) if len(facts.tasks) <= WHOLE_MATRIX else _compressed(facts),
              _doubts(facts), [*_methods(facts), *_sure(facts)], without_id_line(facts),
              _costs(facts)]
    text = "\n\n".join("\n".join(block) for block in blocks if block) + "\n"
    return text.translate(PLAIN)


def _doubts(facts: Facts) -> list[str]:
    lines = [f"WARNING task {_clean(task)!r}: {text}" for task, text in facts.doubts]
    lines += map(_clean, [*facts.forgotten, *(f"NOTE {note}" for note in facts.notes)])
    return [wrapped for line in lines
            for wrapped in textwrap.wrap(line, COLUMNS, subsequent_indent=" " * 8,
                                         break_on_hyphens=False)]  # options and paths stay whole


def _clean(name: str) -> str:
    """A name without control characters, which could move the terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _matrix(facts: Facts) -> list[str]:
    label = min(20, max(len(_clean(name)) for name in facts.labels))
    lines = ["Accuracy in % after training a task (row) on each task (column)",
             " " * label + "".join(f"{number:6d}" for number in facts.numbers)]
    for i, name in enumerate(facts.labels):
        cells = "".join(f"{100 * value:6.1f}" for value in facts.accuracy_TT[i, :i + 1])
        lines.append(f"{shorten(_clean(name), label):{label}}{cells}")
    return lines


def _compressed(facts: Facts) -> list[str]:
    n_tasks, drops = len(facts.tasks), facts.metrics.forgetting_per_task
    lines = ["Accuracy in % on each task"]
    for start in range(0, n_tasks, 10):
        block = range(start, min(start + 10, n_tasks))
        lines.append(f"{'task':14}" + "".join(f"{facts.numbers[j]:7d}" for j in block))
        for title, values in (("when learned", facts.accuracy_TT.diagonal()),
                              ("at the end", facts.accuracy_TT[-1]), ("lost", drops)):
            lines.append(f"{title:14}" + "".join(f"{100 * values[j]:7.1f}" for j in block))
    return lines


def _methods(facts: Facts) -> list[str]:
    lines = [f"{'':24}{'accuracy':>10}{'when learned':>14}{'forgotten':>13}{'a task adds':>13}"
             f"{'learned in':>14}"]
    for method in (facts.ours, *facts.baselines.values()):
        lost = UNKNOWN if method.forgetting is None else in_points(method.forgetting)
        lines.append(f"{shorten(_clean(method.label), 23):24}{percent(method.acc):>10}"
                     f"{percent(method.learning_accuracy):>14}{lost:>13}"
                     f"{size(method.bytes_per_task):>13}{duration(method.seconds):>14}")
    return lines + textwrap.wrap(facts.detector_adds, COLUMNS)


def _sure(facts: Facts) -> list[str]:
    """The accuracy of guessing, the interval of our accuracy, and the answer of the gate."""
    judged = judge(facts)
    interval, refused = mean_interval(judged), sum(each.refused for each in judged)
    words = []
    if interval:
        images = sum(each.images or 0 for each in judged)
        words.append(f"The accuracy has the {interval_in_percent(*interval)} ({images:,} test "
                     "images)")
    if facts.chance is not None:
        words.append(f"guessing gets {percent(facts.chance)}")
    if refused:
        words.append(f"the gate would refuse {refused} of {len(judged)} tasks")
    return textwrap.wrap(f"{'; '.join(words)}.", COLUMNS) if words else []


def _costs(facts: Facts) -> list[str]:
    result = facts.result
    stages = [(STAGES.get(name, str(name)), duration(value))
              for name, value in (dig(result, "seconds", "stages") or {}).items()
              if value is not None]
    total = dig(result, "seconds", "total")
    stages += [("total", duration(total))] if total is not None else []
    sizes = [(label, size(result[field])) for label, field in (
        ("features", "feature_bytes"), ("checkpoint", "checkpoint_bytes"),
        ("trunk", "trunk_bytes"), ("shared", "shared_bytes"), ("per task", "bytes_per_task"),
        ("peak memory", "peak_rss_bytes")) if result.get(field) is not None]
    lines = _wrapped("Time", stages, "of this call: ")
    if dig(result, "seconds", "stages", "train") is not None:
        lines.append(f"{'':8}(tasks: training and tests of every strategy; learned in, above: the "
                     "training alone)")
    lines += _wrapped("Bytes", sizes)
    if result.get("model_uri"):
        lines.append(f"{'Model':8}{_clean(str(result['model_uri']))}")
    return lines


def _wrapped(title: str, pairs: Iterable[tuple[str, str]], lead: str = "") -> list[str]:
    # A no-break space keeps a number beside its name and its unit when the line wraps.
    words = ", ".join(f"{name} {value}".replace(" ", NBSP) for name, value in pairs)
    if not words:
        return []
    return textwrap.wrap(lead + words, COLUMNS, initial_indent=f"{title:8}",
                         subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)
