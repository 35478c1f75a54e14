"""Progress bars that read well where they are shown.

In a notebook: one line with a bar, replaced as it moves. In a terminal: the same with `rich`.
Elsewhere, such as a log file: one line when a step is done, and at most one in QUIET_SECONDS
before that.
"""

import html
import sys
import time
from types import TracebackType
from typing import Any

from partialhn.numbers import percent
from partialhn.training.records import EpochRecord, TaskRecord

QUIET_SECONDS = 10.0


class Bars:
    """Shows how far the steps of a piece of work are. A context; this class shows nothing."""

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """A step has come so far; with `done` equal to `total` its line stays."""

    def record(self, name: str, record: EpochRecord | TaskRecord) -> None:
        """Shows an epoch; a finished task was shown with its last epoch."""
        if isinstance(record, EpochRecord):
            self.show(name, record.epoch, record.epochs,
                      f"loss {record.loss:.3f}, accuracy {percent(record.accuracy)}")

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Leaves the last line as it is."""


class LogBars(Bars):
    """Plain lines to standard error."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done == total or now - self._last > QUIET_SECONDS:
            self._last = now
            print(f"{name}: {done}/{total}" + (f", {note}" if note else ""), file=sys.stderr,
                  flush=True)


class TerminalBars(Bars):
    """Bars of `rich`, one a step."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Left

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Left(),
            TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self._steps: dict[str, Any] = {}

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        if name not in self._steps:
            self._steps[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._steps[name], completed=done, total=total, note=note)

    def __enter__(self) -> "TerminalBars":
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._progress.stop()


class NotebookBars(Bars):
    """HTML bars, one a step, each replaced in its place; no widget is needed."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        from IPython.display import display

        bundle = {"text/plain": f"{name}: {done}/{total}" + (f", {note}" if note else ""),
                  "text/html": bar_html(name, done, total, note)}
        if name in self._handles:
            self._handles[name].update(bundle, raw=True)
        else:
            self._handles[name] = display(bundle, raw=True, display_id=True)


def bar_html(name: str, done: int, total: int, note: str) -> str:
    """A line with a bar, in the page's own colours."""
    return (f'<div style="font-family:monospace">{html.escape(name)} '
            f'<progress value="{done}" max="{total}" style="vertical-align:middle"></progress> '
            f"{done}/{total} <small>{html.escape(note)}</small></div>")


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process; a terminal's IPython is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


def open_bars(progress: bool) -> Bars:
    """The bars for the place where this process runs; none where they are not wanted."""
    if not progress:
        return Bars()
    if in_notebook():
        return NotebookBars()
    return TerminalBars() if sys.stderr.isatty() else LogBars()
