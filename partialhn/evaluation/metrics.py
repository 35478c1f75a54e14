"""Metrics of a stream of tasks: accuracy, forgetting, backward and forward transfer.

All metrics read one table, `accuracy_TT` (the R of the literature): R[i, j] is the accuracy, 0 to
1, on task j's test images after training task i. Rows are moments, columns are tasks. What was
not measured is NaN: normally everything above the diagonal, since a task that has not arrived
cannot be tested.

Shape suffixes: T tasks.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from partialhn.errors import InputError

Table = npt.ArrayLike | Sequence[Sequence[float | None]]
Checked = npt.NDArray[np.float64]
"""A table as `as_accuracy_table` returns it."""


@dataclasses.dataclass(frozen=True)
class StreamMetrics:
    """The numbers of one stream; all are shares, 0.01 is one percentage point."""

    accuracy: float
    """ACC: mean accuracy over all tasks at the end."""
    learning_accuracy: float
    """LA: mean accuracy on each task right after it was trained."""
    forgetting: float
    """Mean drop of the earlier tasks from their best to the end; 0 or more."""
    backward_transfer: float
    """BWT: mean change of the earlier tasks since they were trained; negative is loss."""
    forgetting_per_task: tuple[float, ...]
    """Drop of each task from its best to the end; the last task's is 0."""


def as_accuracy_table(accuracy_TT: Table) -> npt.NDArray[np.float64]:
    """The table as a checked float64 array; None stands for NaN, as in `result.json`.

    Raises: InputError for a table that is not T x T with T at least 1, for an accuracy outside
    0 to 1, and for a hole on or below the diagonal.
    """
    try:
        table_TT = np.array(accuracy_TT, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"accuracy_TT cannot be read as a table of numbers ({error}); "
                         "allowed: T rows of T accuracies, NaN or None above the diagonal"
                         ) from error
    if table_TT.ndim != 2 or table_TT.shape[0] != table_TT.shape[1] or table_TT.size == 0:
        raise InputError(f"accuracy_TT has shape {table_TT.shape}; allowed: T x T, T at least 1")
    outside_TT = ~np.isnan(table_TT) & ~((table_TT >= 0) & (table_TT <= 1))
    if outside_TT.any():
        i, j = np.argwhere(outside_TT)[0]
        raise InputError(f"accuracy_TT[{i}, {j}] is {table_TT[i, j]}; allowed: 0 to 1")
    holes_TT = np.tril(np.isnan(table_TT))
    if holes_TT.any():
        i, j = np.argwhere(holes_TT)[0]
        raise InputError(f"accuracy_TT[{i}, {j}] is not measured; allowed: holes above the "
                         "diagonal only")
    return table_TT


def accuracy(accuracy_TT: Table) -> float:
    """ACC: mean over j of R[T-1, j]."""
    return summarise(accuracy_TT).accuracy


def learning_accuracy(accuracy_TT: Table) -> float:
    """LA: mean over j of R[j, j]."""
    return summarise(accuracy_TT).learning_accuracy


def forgetting_by_task(accuracy_TT: Table) -> npt.NDArray[np.float64]:
    """F_j: max over i >= j of R[i, j], minus R[T-1, j]; shape T, the last entry is 0.

    What is measured before a task is trained (i < j) does not count: it cannot be forgotten.
    """
    return _forgetting_by_task(as_accuracy_table(accuracy_TT))


def forgetting(accuracy_TT: Table) -> float:
    """Mean over j < T-1 of F_j; 0 for a single task (Chaudhry et al. 2018)."""
    return summarise(accuracy_TT).forgetting


def backward_transfer(accuracy_TT: Table) -> float:
    """BWT: mean over j < T-1 of R[T-1, j] - R[j, j]; 0 for a single task.

    Lopez-Paz and Ranzato 2017, equation 3.
    """
    return summarise(accuracy_TT).backward_transfer


def forward_transfer(accuracy_TT: Table, untrained_T: npt.ArrayLike) -> float:
    """FWT: mean over j >= 1 of R[j-1, j] - b_j, with b_j the accuracy of an untrained model.

    Lopez-Paz and Ranzato 2017, equation 4. It needs every task measured once before it is
    trained, that is the diagonal just above the main one.

    Raises: InputError for a single task, a wrong length of `untrained_T` or an unmeasured entry.
    """
    table_TT = as_accuracy_table(accuracy_TT)
    base_T = np.array(untrained_T, dtype=np.float64)
    if base_T.shape != table_TT.shape[:1]:
        raise InputError(f"untrained_T has shape {base_T.shape}; allowed: one accuracy for each "
                         f"of the {len(table_TT)} tasks")
    ahead_T = np.diagonal(table_TT, offset=1)
    if len(ahead_T) == 0:
        raise InputError("forward transfer of 1 task is undefined; allowed: 2 tasks or more")
    if np.isnan(ahead_T).any():
        j = int(np.argwhere(np.isnan(ahead_T))[0, 0]) + 1
        raise InputError(f"accuracy_TT[{j - 1}, {j}] is not measured; forward transfer needs each "
                         "task's accuracy just before it is trained")
    return float((ahead_T - base_T[1:]).mean())


def summarise(accuracy_TT: Table, counted: Sequence[int] | None = None) -> StreamMetrics:
    """All metrics that the table alone decides (forward transfer needs a baseline as well).

    counted: the columns that count as tasks, in order and with the last one; default: all. Every
    row counts as a moment.
    """
    table_TT = as_accuracy_table(accuracy_TT)  # once: a thousand tasks have a million numbers
    chosen = range(len(table_TT)) if counted is None else counted
    now_T, learned_T = table_TT[-1][chosen], np.diagonal(table_TT)[chosen]
    lost_T = _forgetting_by_task(table_TT)[chosen]
    return StreamMetrics(float(now_T.mean()), float(learned_T.mean()), _mean(lost_T[:-1]),
                         _mean((now_T - learned_T)[:-1]), tuple(lost_T.tolist()))


def _forgetting_by_task(table_TT: Checked) -> npt.NDArray[np.float64]:
    trained_TT = np.tril(np.ones_like(table_TT, dtype=bool))
    best_T = np.where(trained_TT, table_TT, -np.inf).max(axis=0)
    return np.asarray(best_T - table_TT[-1])


def _mean(change_T: npt.NDArray[np.float64]) -> float:
    return float(change_T.mean()) if len(change_T) else 0.0
