"""The rows of a benchmark as CSV and as Markdown."""

import csv
import io
from collections.abc import Sequence

from partialhn.benchmarks.comparison import Row
from partialhn.evaluation.intervals import Interval
from partialhn.numbers import margin, percent, percent_with_margin, points

HEADS = ("strategy", "depth", "seeds", "acc", "acc_low", "acc_high", "learning_accuracy",
         "forgetting", "ahead", "ahead_low", "ahead_high", "bytes_per_task", "cpu_seconds",
         "feature_bytes", "expected_low", "expected_high", "class_incremental")


def table_csv(rows: Sequence[Row]) -> str:
    """A line for each row: shares of 1, bytes, seconds; a missing number is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HEADS)
    for row in rows:
        ahead = (row.ahead.mean, row.ahead.low, row.ahead.high) if row.ahead else (None,) * 3
        writer.writerow([
            row.label, row.depth, len(row.acc.values),
            *map(_short, (row.acc.mean, row.acc.low, row.acc.high, row.learning_accuracy.mean,
                          row.forgetting.mean, *ahead)),
            round(row.bytes_per_task), _short(row.cpu_seconds), row.feature_bytes,
            *map(_short, row.expected or (None, None)), _short(row.class_incremental)])
    return text.getvalue()


def table_markdown(rows: Sequence[Row], unit: str, chance: float) -> str:
    """The table for people: per cent and points, with 95 % intervals over seeds.

    unit: stage or block, which depths count. chance: accuracy of guessing.
    """
    heads, cells = table_columns(rows, unit, chance)
    lines = [heads, ["---"] * len(heads), *cells]
    several = any(row.acc.low is not None for row in rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (
        "\n± is half of a 95 % interval over seeds.\n" if several else "")


def table_columns(rows: Sequence[Row], unit: str,
                  chance: float) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table for people; arguments as for `table_markdown`."""
    heads = ["strategy", f"frozen {unit}s", "accuracy", "when learned", "forgotten, points",
             "partial hypernetwork ahead by, points", "a task adds", "processor time", "recorded"]
    cells = [
        [row.label, str(row.depth), _percent(row.acc), _percent(row.learning_accuracy),
         _points(row.forgetting), _points(row.ahead, signed=True) if row.ahead else "",
         f"{row.bytes_per_task / 1000:,.1f} kB", f"{row.cpu_seconds:.1f} s", _recorded(row)]
        for row in rows]
    if any(row.class_incremental is not None for row in rows):
        heads.insert(3, "without the task")
        for row, line in zip(rows, cells, strict=True):
            line.insert(3, "" if row.class_incremental is None else percent(row.class_incremental))
    last = ["guessing", "", percent(chance)]
    return heads, [*cells, last + [""] * (len(heads) - len(last))]


def verdict(rows: Sequence[Row]) -> str:
    """One line that names the rows outside of their recorded range."""
    known = [row for row in rows if row.expected is not None]
    outside = [row.key for row in known if not row.as_expected]
    if not known:
        return "no earlier run of this size is recorded to compare with"
    if not outside:
        return f"all {len(known)} accuracies lie in the range of the recorded runs"
    return (f"{len(outside)} of {len(known)} accuracies lie outside of the range of the recorded "
            "runs: " + ", ".join(outside))


def _recorded(row: Row) -> str:
    if row.expected is None:
        return ""
    low, high = (100 * each for each in row.expected)
    return f"{low:.1f} to {high:.1f} %" + ("" if row.as_expected else ": outside")


def _percent(value: Interval) -> str:
    return percent_with_margin(value.mean, value.low)


def _points(value: Interval, signed: bool = False) -> str:
    return points(value.mean, signed) + margin(value.mean, value.low)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
