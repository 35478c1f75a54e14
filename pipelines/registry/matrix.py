"""The accuracy matrix as a table: R[i][j] is the accuracy on task j after learning task i."""

import csv
import io
from collections.abc import Sequence

Matrix = Sequence[Sequence[float | None]]


def matrix_csv(accuracy_matrix: Matrix, tasks: Sequence[str]) -> str:
    """A row for each moment, a column for each task; empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after", *tasks])
    writer.writerows([task, *row] for task, row in zip(tasks, accuracy_matrix, strict=True))
    return text.getvalue()
