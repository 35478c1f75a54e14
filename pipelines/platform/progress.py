"""Progress lines for people while a run works: task, epoch, accuracy, and time left."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

from partialhn.config import Config
from partialhn.evaluation.metrics import StreamMetrics
from partialhn.features.manifest import Manifest
from partialhn.numbers import counted, duration, in_points, percent, size
from partialhn.training.records import EpochRecord, TaskRecord

QUIET_SECONDS = 5.0
"""Seconds between two lines about epochs when the output is not a terminal."""


class Progress:
    """Prints one line per event; on a terminal the lines of epochs overwrite each other."""

    def __init__(self, config: Config, log: Callable[[str], None]) -> None:
        self._config, self._log = config, log
        self._live = log is print and sys.stdout.isatty()
        self._open = False
        self._last = 0.0
        self._seconds: dict[str, list[float]] = {}
        self._seen: set[tuple[str, int, int]] = set()

    def line(self, text: str) -> None:
        """Prints a permanent line."""
        if self._open:
            sys.stdout.write("\r\x1b[K")
            self._open = False
        self._log(text)
        if self._live:
            sys.stdout.flush()

    def trunk(self, record: EpochRecord) -> None:
        """Shows an epoch of the trunk's training."""
        self._epoch(f"trunk  epoch {record.epoch}/{record.epochs}  loss {record.loss:.3f}  "
                    f"accuracy {percent(record.accuracy)}",
                    self._time_left("trunk", record, record.epochs - record.epoch),
                    record.epoch == record.epochs)

    def features(self, done: int, total: int) -> None:
        """Shows the number of finished feature shards."""
        self._epoch(f"features  shard {done}/{total}", "", done == total)

    def features_done(self, manifests: Sequence[Manifest], decoded: int) -> None:
        """Shows that all features are stored, and which images were left out."""
        stored = size(sum(manifest.bytes for manifest in manifests))
        source = f"{counted(decoded, 'image')} decoded" if decoded else "found, 0 images decoded"
        self.line(f"features: {stored} ({source})")
        for manifest in manifests:
            for name, reason in manifest.bad:
                self.line(f"  left out {name}: {reason}")

    def record(self, strategy: str, record: EpochRecord | TaskRecord) -> None:
        """Shows an epoch, or the end of a task."""
        label = "" if strategy == self._config.train.strategy else f"{strategy}  "
        if isinstance(record, TaskRecord):
            self._seen = {key for key in self._seen if key[:2] != (strategy, record.task_index)}
            shown = ", ".join(percent(value) for value in record.accuracy_row[-8:])
            more = "..., " if len(record.accuracy_row) > 8 else ""
            self.line(f"{label}task {record.task_index + 1} {record.task!r} learned in "
                      f"{duration(record.train_seconds)}; accuracy on the tasks so far: "
                      f"{more}{shown}")
            return
        key = strategy, record.task_index, record.epoch
        if key in self._seen:  # the worker sent it at once, and again at the end of its task
            return
        self._seen.add(key)
        validation = record.validation_accuracy
        held_out = "" if validation is None else f" (held out {percent(validation)})"
        self._epoch(f"{label}task {record.task_index + 1} {record.task!r}  epoch {record.epoch}/"
                    f"{record.epochs}  loss {record.loss:.3f}  accuracy {percent(record.accuracy)}"
                    f"{held_out}",
                    self._time_left(strategy, record, record.epochs - record.epoch), False)

    def registered(self, uri: str, record: TaskRecord, summary: StreamMetrics, *,
                   new: bool) -> None:
        """Shows a version that is registered now, or was registered before."""
        words = "registered" if new else "already registered:"
        self.line(f"  {words} {uri} (task {record.task!r}): accuracy {percent(summary.accuracy)} "
                  f"over the tasks so far, {in_points(summary.forgetting)} forgotten")

    def _time_left(self, key: str, record: EpochRecord, epochs: int) -> str:
        """The time left of the trunk or of this task, estimated from its latest epochs."""
        seconds = self._seconds.setdefault(f"{key}/{record.task_index}", [])
        seconds.append(record.seconds)
        usual = statistics.median_low(seconds[-5:])  # one may have waited for something else
        left = "trunk" if key == "trunk" else "task"
        return f"  about {duration(epochs * usual)} left of the {left}"

    def _epoch(self, text: str, time_left: str, last: bool) -> None:
        if self._live:
            sys.stdout.write(f"\r\x1b[K{text}{time_left}")
            sys.stdout.flush()
            self._open = True
            if last:
                self.line(text)
        elif last or time.monotonic() - self._last > QUIET_SECONDS:
            self._last = time.monotonic()
            self._log(text + ("" if last else time_left))
