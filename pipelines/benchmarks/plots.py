"""Charts of a benchmark as SVG: accuracy by depth, by cost and over time, and forgetting.

All accuracies are in per cent, as in the tables, with a line for guessing.
"""

import dataclasses
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from partialhn.benchmarks.catalogue import EVERY
from partialhn.benchmarks.comparison import Row

ORDER = (*EVERY, "full_hn", "er")
"""A strategy has the same colour in every benchmark."""
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
PALETTE = ("#1f77b4", "#d95f02", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#c255a0", "#6b6b6b",
           "#8a8b12", "#128a99")
SPARE = 24
"""Most numbers that an axis of tasks carries."""
_NAMED = re.compile(r'(\bid="|url\(#|href="#)')

Cells = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """One chart: its title, a sentence about it, and the function that draws it on axes."""

    key: str
    title: str
    caption: str
    draw: Callable[[Any], None]


def panels(rows: Sequence[Row], cells: Cells, depth: int, unit: str) -> list[Panel]:
    """The charts; those over tasks show the rows at `depth`, the depth of the preset.

    unit: stage or block, which depths count.
    """
    own = [row for row in rows if row.depth == depth]
    mine = [cell for cell in cells if cell["depth"] == depth]
    chance_T = [1 / len(task["classes"]) for task in cells[0]["tasks"]]
    chance = float(np.mean(chance_T))
    several = any(row.acc.low is not None for row in rows)
    at = f"With {depth} {unit}s frozen."
    return [
        Panel("by-depth", "Accuracy against freeze depth", "Mean accuracy at the end of the stream"
              + (", with 95 % intervals over seeds." if several else ", one seed."),
              lambda axes: _by_depth(axes, rows, unit, chance)),
        Panel("by-cost", "Accuracy against cost", "The number in a mark is its depth. The cost is "
              "the processor time of the whole stream without its features.",
              lambda axes: _by_cost(axes, rows, chance)),
        Panel("forgotten", "Forgotten by the end", "How far each task, numbered from 0, fell below "
              f"its best accuracy by the end. {at}", lambda axes: _forgetting(axes, own, mine)),
        Panel("over-time", "Accuracy over the stream", "Mean accuracy of all tasks that were "
              f"learned so far. {at}", lambda axes: _over_time(axes, own, mine, chance_T))]


def colours(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Each strategy with its colour, in the order of the rows."""
    return [(_colour(label), label) for label in dict.fromkeys(row.label for row in rows)]


def panel_svg(panel: Panel) -> str:
    """One chart for a page, as wide as a phone; its ids are its own."""
    text = _drawn(panel.key, (4.7, 3.7), lambda figure: panel.draw(figure.subplots()))
    text = _NAMED.sub(rf"\g<1>{panel.key}-", text[text.index("<svg"):])
    return text.replace("<svg ", f'<svg class="mpl" role="img" aria-label="{panel.title}" ', 1)


def plots_svg(rows: Sequence[Row], cells: Cells, depth: int, unit: str) -> str:
    """All charts in one SVG file, with a legend. Arguments: as for `panels`."""
    def draw(figure: Any) -> None:
        found = panels(rows, cells, depth, unit)
        for panel, axes in zip(found, figure.subplots(2, 2).flatten(), strict=True):
            panel.draw(axes)
            axes.set_title(panel.title)
        handles = [_handle(colour) for colour, _ in colours(rows)]
        figure.legend(handles, [label for _, label in colours(rows)],
                      loc="outside lower center", ncols=5)

    return _drawn("pack", (11, 8.4), draw)


def _drawn(salt: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10,
                         "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata=NO_METADATA, transparent=salt != "pack")
    return sink.getvalue()


def _handle(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker="o")


def _colour(label: str) -> str:
    same = {"full_hn": "partial_hn", "er": "latent_replay"}
    return PALETTE[EVERY.index(same.get(label, label)) % len(PALETTE)]


def _guessing(axes: Any, chance: float) -> None:
    axes.axhline(100 * chance, color="#777777", linestyle="--", linewidth=1)
    axes.annotate(f"guessing {100 * chance:.1f} %", (1, 100 * chance), xytext=(0, 3),
                  xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                  fontsize=9)


def _by_depth(axes: Any, rows: Sequence[Row], unit: str, chance: float) -> None:
    strategies: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.depth):
        strategies.setdefault(_colour(row.label), []).append(row)
    for place, (colour, line) in enumerate(strategies.items()):
        aside = 0.03 * (place - (len(strategies) - 1) / 2)  # so that intervals do not cover others
        half = [[0 if row.acc.low is None else 100 * (row.acc.mean - row.acc.low)
                 for row in line]] * 2
        axes.errorbar([row.depth + aside for row in line], [100 * row.acc.mean for row in line],
                      half if any(half[0]) else None, color=colour, marker="o", capsize=3)
    depths = sorted({row.depth for row in rows})
    axes.set(xlabel=f"frozen {unit}s", ylabel="accuracy, %", xticks=depths,
             xlim=(depths[0] - 0.3, depths[-1] + 0.3))
    _guessing(axes, chance)


def _by_cost(axes: Any, rows: Sequence[Row], chance: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for row in rows:
        place = (max(row.cpu_seconds, 1e-2), 100 * row.acc.mean)
        axes.scatter(*place, s=150, color=_colour(row.label), edgecolors="white", linewidths=0.8)
        axes.annotate(str(row.depth), place, ha="center", va="center", fontsize=8, color="white",
                      gid="mark")
    axes.set(xscale="log", ylabel="accuracy, %", xlabel="processor time, s")
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 3), numticks=8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.12, y=0.12)
    _guessing(axes, chance)


def _forgetting(axes: Any, rows: Sequence[Row], cells: Cells) -> None:
    tasks = cells[0]["tasks"]
    width = 0.8 / max(1, len(rows))
    for place, row in enumerate(rows):
        lost_T = np.mean([_forgotten(cell) for cell in cells if cell["label"] == row.label], 0)
        axes.bar(np.arange(len(tasks)) + place * width - 0.4 + width / 2, 100 * lost_T, width,
                 color=_colour(row.label))
    axes.set_xticks(range(0, len(tasks), -(-len(tasks) // SPARE)))
    axes.set(ylabel="forgotten, points", xlabel="task")
    if axes.get_ylim()[1] < 1:
        axes.set_ylim(top=1)


def _over_time(axes: Any, rows: Sequence[Row], cells: Cells, chance_T: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    for row in rows:
        curves = [[100 * np.mean([value for value in line if value is not None])
                   for line in cell["accuracy_matrix"]]
                  for cell in cells if cell["label"] == row.label]
        axes.plot(range(1, len(curves[0]) + 1), np.mean(curves, 0), marker=".",
                  color=_colour(row.label))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="tasks learned", ylabel="accuracy on all so far, %")
    _guessing(axes, float(np.mean(chance_T)))


def _forgotten(cell: Mapping[str, Any]) -> Any:
    R_TT = np.array([[np.nan if value is None else value for value in line]
                     for line in cell["accuracy_matrix"]])
    return np.nanmax(R_TT, 0) - R_TT[-1]
