"""Charts of a benchmark in one SVG: accuracy by depth, by cost and over time, and forgetting."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partialhn.benchmarks.catalogue import EVERY
from partialhn.benchmarks.comparison import Row

ORDER = (*EVERY, "full_hn", "er")
"""A strategy has the same colour in every benchmark."""
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def plots_svg(rows: Sequence[Row], cells: Sequence[Mapping[str, Any]], depth: int,
              unit: str) -> str:
    """Four panels; those over tasks show the rows at `depth`, the depth of the preset.

    unit: stage or block, which depths count.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pack", "font.size": 9}):
        figure = Figure(figsize=(11, 8), layout="constrained")
        FigureCanvasSVG(figure)
        (by_depth, by_cost), (forgetting, over_time) = figure.subplots(2, 2)
        _by_depth(by_depth, rows, unit)
        _by_cost(by_cost, rows)
        own = [row for row in rows if row.depth == depth]
        mine = [cell for cell in cells if cell["depth"] == depth]
        _forgetting(forgetting, own, mine)
        _over_time(over_time, own, mine)
        handles, labels = over_time.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata=NO_METADATA)
    return sink.getvalue()


def _colour(label: str) -> str:
    same = {"full_hn": "partial_hn", "er": "latent_replay"}
    return f"C{EVERY.index(same.get(label, label))}"


def _by_depth(axes: Any, rows: Sequence[Row], unit: str) -> None:
    strategies: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.depth):
        strategies.setdefault(_colour(row.label), []).append(row)
    for colour, line in strategies.items():
        low_high = [[0 if row.acc.low is None else row.acc.mean - row.acc.low for row in line]] * 2
        axes.errorbar([row.depth for row in line], [row.acc.mean for row in line], low_high,
                      color=colour, marker="o", capsize=3)
    depths = sorted({row.depth for row in rows})
    axes.set(title="Accuracy against freeze depth (95 % over seeds)", xlabel=f"frozen {unit}s",
             ylabel="ACC", xticks=depths)


def _by_cost(axes: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        axes.scatter(max(row.cpu_seconds, 1e-2), row.acc.mean, color=_colour(row.label))
        axes.annotate(f"{row.label} {row.depth}", (max(row.cpu_seconds, 1e-2), row.acc.mean),
                      xytext=(4, 3), textcoords="offset points", fontsize=7)
    axes.set(title="Accuracy against cost", xscale="log", ylabel="ACC",
             xlabel="processor seconds for the stream, features aside")


def _forgetting(axes: Any, rows: Sequence[Row], cells: Sequence[Mapping[str, Any]]) -> None:
    tasks = cells[0]["tasks"]
    width = 0.8 / max(1, len(rows))
    for place, row in enumerate(rows):
        lost_T = np.mean([_forgotten(cell) for cell in cells if cell["label"] == row.label], 0)
        axes.bar(np.arange(len(tasks)) + place * width - 0.4 + width / 2, 100 * lost_T, width,
                 color=_colour(row.label))
    names = [each["name"] if each["transform"] == "none"
             else f"{each['name']}\n{each['transform']}" for each in tasks]
    axes.set_xticks(range(len(tasks)), names, fontsize=7)
    axes.set(title="Forgotten by the end, by task (image change below)", ylabel="points",
             xlabel="task")


def _over_time(axes: Any, rows: Sequence[Row], cells: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        curves = [[np.mean([value for value in line if value is not None])
                   for line in cell["accuracy_matrix"]]
                  for cell in cells if cell["label"] == row.label]
        axes.plot(range(1, len(curves[0]) + 1), np.mean(curves, 0), marker=".",
                  color=_colour(row.label), label=row.label)
    axes.set_xticks(range(1, len(cells[0]["tasks"]) + 1))
    axes.set(title="Mean accuracy over the stream", xlabel="tasks learned",
             ylabel="accuracy on all so far")


def _forgotten(cell: Mapping[str, Any]) -> Any:
    R_TT = np.array([[np.nan if value is None else value for value in line]
                     for line in cell["accuracy_matrix"]])
    return np.nanmax(R_TT, 0) - R_TT[-1]
