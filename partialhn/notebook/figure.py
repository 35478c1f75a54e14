"""The figure of a stream's accuracies.

Legend: T tasks.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from partialhn.notebook.display import CELLS, Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class AccuracyFigure(Figure):
    """A figure that a notebook shows as it is, whether or not `pyplot` was imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, facecolor="white")
        return buffer.getvalue()


def plot(names: Sequence[str], rows: Rows, classes: Sequence[int]) -> Figure:
    """The accuracy matrix, and its mean after each task beside chance.

    classes: number of classes of each task, for the accuracy of guessing.
    """
    figure = AccuracyFigure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _matrix(left, names, rows)
    after = range(1, len(rows) + 1)
    mean_T = [100 * float(np.mean(row)) for row in rows]
    chance_T = [100 * float(np.mean([1 / count for count in classes[:number]]))
                for number in after]
    right.plot(after, mean_T, marker="o", label="this model")
    right.plot(after, chance_T, linestyle="--", color="grey", label="chance")
    right.set(xlabel="tasks learned", ylabel="mean accuracy on the tasks so far (%)",
              ylim=(0, 102), xticks=list(after)[::max(1, len(rows) // CELLS)])
    right.legend(loc="lower left")
    return figure


def _matrix(axes: "Axes", names: Sequence[str], rows: Rows) -> None:
    total = len(rows)
    percent_TT = np.full((total, total), np.nan)
    for number, row in enumerate(rows):
        percent_TT[number, :len(row)] = 100 * np.asarray(row)
    image = axes.imshow(percent_TT, vmin=0, vmax=100, cmap="Blues")
    places = range(0, total, max(1, total // CELLS))
    labels = [names[place] for place in places]
    axes.set_xticks(list(places), labels, rotation=45 if max(map(len, labels)) > 3 else 0)
    axes.set_yticks(list(places), labels)
    axes.set(xlabel="accuracy on task", ylabel="after learning task")
    if total <= CELLS:
        for (i, j), value in np.ndenumerate(percent_TT):
            if not np.isnan(value):
                axes.text(j, i, f"{value:.0f}", ha="center", va="center",
                          color="white" if value > 60 else "black")
    axes.figure.colorbar(image, ax=axes, label="test accuracy (%)", shrink=0.8)
