"""The summary of a benchmark: one row for each strategy and depth, over its seeds."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from partialhn.evaluation.intervals import Interval, paired


@dataclasses.dataclass(frozen=True)
class Row:
    """One strategy at one depth."""

    label: str
    depth: int
    acc: Interval
    learning_accuracy: Interval
    forgetting: Interval
    ahead: Interval | None
    """ACC of the partial hypernetwork of the same depth minus this one's, seed by seed."""
    bytes_per_task: float
    cpu_seconds: float
    """Processor time to learn and test the stream."""
    feature_bytes: int
    expected: tuple[float, float] | None
    """Lowest and highest ACC expected from a recorded run; None without one."""
    class_incremental: float | None = None
    """Accuracy after the last task where nobody says the task; None in cells of version 0.1.0."""

    @property
    def key(self) -> str:
        """The key of the row in `expected.json`."""
        return f"{self.label}@{self.depth}"

    @property
    def as_expected(self) -> bool | None:
        """Whether ACC lies in the expected range; None without a range."""
        if self.expected is None:
            return None
        return self.expected[0] <= self.acc.mean <= self.expected[1]


def rows(cells: Sequence[Mapping[str, Any]],
         expected: Mapping[str, tuple[float, float]]) -> list[Row]:
    """Rows by depth, the most accurate first."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["depth"], cell["label"]), []).append(cell)
    ours = {group[0]["depth"]: _by_seed(group) for group in groups.values()
            if group[0]["strategy"] == "partial_hn"}
    table = []
    for (depth, label), group in groups.items():
        theirs = _by_seed(group)
        is_ours = group[0]["strategy"] == "partial_hn"
        acc, learned, lost = (Interval.of([cell[key] for cell in group])
                              for key in ("acc", "learning_accuracy", "forgetting"))
        table.append(Row(
            label, depth, acc, learned, lost,
            ahead=None if is_ours or depth not in ours else paired(ours[depth], theirs),
            bytes_per_task=_mean(group, "bytes_per_task"), cpu_seconds=_mean(group, "cpu_seconds"),
            feature_bytes=group[0]["feature_bytes"], expected=expected.get(f"{label}@{depth}"),
            class_incremental=_class_incremental(group)))
    return sorted(table, key=lambda row: (row.depth, -row.acc.mean))


def _by_seed(group: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {cell["seed"]: cell["acc"] for cell in group}


def _class_incremental(group: Sequence[Mapping[str, Any]]) -> float | None:
    accuracies = [cell["class_incremental"]["last"] for cell in group
                  if "class_incremental" in cell]
    return sum(accuracies) / len(accuracies) if len(accuracies) == len(group) else None


def _mean(group: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(cell[key] for cell in group) / len(group))
