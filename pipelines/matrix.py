"""The accuracy matrix as artifacts: R[i][j] is the accuracy on task j after learning task i.

Shape suffix: T tasks.
"""

import csv
import io
from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[float | None]]


def matrix_csv(accuracy_matrix: Matrix, tasks: Sequence[str]) -> str:
    """A row for each moment, a column for each task; empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["after", *tasks])
    writer.writerows([task, *row] for task, row in zip(tasks, accuracy_matrix, strict=True))
    return text.getvalue()


def matrix_figure(accuracy_matrix: Matrix, tasks: Sequence[str]) -> Any:
    """A heat map (matplotlib figure), white where nothing was measured."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    accuracy_TT = np.array([[np.nan if v is None else v for v in row] for row in accuracy_matrix])
    side = min(3 + 0.45 * len(tasks), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(accuracy_TT, vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="accuracy on task", ylabel="after learning task", title="Accuracy matrix")
    if len(tasks) <= 40:
        axes.set_xticks(range(len(tasks)), tasks, rotation=90)
        axes.set_yticks(range(len(tasks)), tasks)
    if len(tasks) <= 12:
        for (i, j), value in np.ndenumerate(accuracy_TT):
            if not np.isnan(value):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="black" if value > 0.6 else "white")
    figure.colorbar(image)
    return figure
