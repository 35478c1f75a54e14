"""How a stream and a learned task look in a notebook: tables in the page's own colours."""

import dataclasses
import html
from collections.abc import Sequence

from partialhn.numbers import duration, percent
from partialhn.training.records import TaskRecord

Rows = Sequence[Sequence[float]]
"""Row i: the accuracy, 0 to 1, on tasks 0 to i after task i."""
CELLS = 12
"""Tasks of which a table or a figure writes every number."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task that was learned, and how good the model is now."""

    task: str
    """Name of the task."""
    index: int
    """Its place in the stream, from 0."""
    tasks: int
    """Tasks of the whole stream."""
    accuracy: dict[str, float]
    """Task -> share of its test images answered right, of every task so far; 0 to 1."""
    seconds: float
    """Wall seconds that learning the task took, without features and measuring."""

    @staticmethod
    def of(record: TaskRecord, names: Sequence[str]) -> "TaskResult":
        """The result of a record; `names` are those of the stream's tasks."""
        return TaskResult(record.task, record.task_index, len(names),
                          dict(zip(names, record.accuracy_row, strict=False)),
                          record.train_seconds)

    def __str__(self) -> str:
        return (f"task {self.task!r} ({self.index + 1} of {self.tasks}): accuracy "
                f"{percent(self.accuracy[self.task])}, mean of the tasks so far "
                f"{percent(sum(self.accuracy.values()) / len(self.accuracy))}, learned in "
                f"{duration(self.seconds)}")

    def _repr_html_(self) -> str:
        rows = [[name, percent(value)] for name, value in self.accuracy.items()]
        return (f"<p>{html.escape(str(self))}</p>"
                + table_html(["task", "accuracy"], rows[-CELLS:]))


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]],
               shares: Sequence[Sequence[float | None]] = ()) -> str:
    """A table; `shares` (0 to 1) shade the cells behind the first column."""
    lines = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = []
    for number, row in enumerate(rows):
        shade = shares[number] if shares else [None] * (len(row) - 1)
        cells = [f'<th style="text-align:left">{html.escape(row[0])}</th>']
        for cell, share in zip(row[1:], shade, strict=True):
            style = "" if share is None else f"background:rgba(44,127,184,{0.45 * share:.2f});"
            cells.append(f'<td style="{style}text-align:right">{html.escape(cell)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (f'<table style="color:inherit"><thead><tr>{lines}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table>")


def stream_html(title: str, names: Sequence[str], rows: Rows) -> str:
    """The tasks of a stream and the accuracy matrix of those that are learned."""
    learned = len(rows)
    left = ", ".join(names[learned:learned + CELLS])
    text = [f"<p><b>{html.escape(title)}</b>: {learned} of {len(names)} tasks learned"
            + (f"; left: {html.escape(left)}" if left else "") + "</p>"]
    if learned:
        first = max(0, learned - CELLS)
        shares: list[list[float | None]] = [
            [*row[first:], *[None] * (learned - len(row))] for row in rows[first:]]
        cells = [[name, *("" if value is None else percent(value) for value in row)]
                 for name, row in zip(names[first:learned], shares, strict=True)]
        text.append(table_html(["after task", *names[first:learned]], cells, shares))
    return "".join(text)
