"""The report's charts: each function takes plain values and returns one inline SVG element.

Drawn in units of about one pixel on a phone: 400 wide is half a desktop page or a whole phone
screen, so that text stays readable on both without a second drawing. Colours are CSS classes of
the page (light and dark mode); every mark that carries a number has a native <title> tooltip.
"""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WIDTH = 400
WITH_TEXT = 25
"""Up to this many tasks a heat map cell carries its number."""
WHOLE = 60
"""Up to this many tasks every cell of a heat map is one task."""
BLOCKS = 50
"""Cells along each side beyond that, at most."""
NARROW = 10
"""Up to this many tasks a heat map with numbers fits a phone."""
HEAT_BINS = 10


@dataclasses.dataclass(frozen=True)
class Bar:
    """One row of a bar chart: `parts` are (value, class) drawn one after the other."""

    label: str
    parts: tuple[tuple[float, str], ...]
    text: str
    tooltip: str


@dataclasses.dataclass(frozen=True)
class Line:
    """One line: points (x, y), a CSS class, a label at its end ("" for none), a tooltip."""

    points: tuple[tuple[float, float], ...]
    css: str
    label: str
    tooltip: str


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length - 1].rstrip() + "…"


def number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def svg(key: str, title: str, description: str, height: float, body: Sequence[str],
        width: float = WIDTH) -> str:
    return (f'<svg id="{key}" viewBox="0 0 {number(width)} {number(height)}" role="img" '
            f'aria-labelledby="{key}-t {key}-d"><title id="{key}-t">{escape(title)}</title>'
            f'<desc id="{key}-d">{escape(description)}</desc>{"".join(body)}</svg>')


def text(x: float, y: float, content: object, css: str = "ax", anchor: str = "start") -> str:
    at = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{number(x)}" y="{number(y)}" class="{css}"{at}>{escape(content)}</text>'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` of them."""
    if high - low < 1e-12:
        high = low + 1.0
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [i * step for i in range(first, last + 1)]


def tick_step(n: int) -> int:
    """A round distance between the labels of 0 to n-1, for about a dozen of them at most."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 10 ** 9) if n <= 13 * step)


def accuracy_ticks(values: npt.ArrayLike) -> list[float]:
    """Ticks for accuracies: never above 1, and at least ten points wide so that noise stays
    small on the page.
    """
    flat = np.asarray(values, dtype=float)
    low, high = float(np.nanmin(flat)), float(np.nanmax(flat))
    low = max(0.0, min(low, high - 0.1))
    return [tick for tick in nice_ticks(low, max(high, low + 0.1)) if -1e-9 <= tick <= 1 + 1e-9]


def heat_map(key: str, names: Sequence[str], accuracy_TT: npt.NDArray[np.float64],
             description: str, guessing: Sequence[float] = (), most: int = WITH_TEXT,
             numbers: Sequence[int] = ()) -> str:
    """The accuracy matrix; its numbers are written in the cells up to `most` tasks.

    Beyond `WHOLE` tasks, neighbours are drawn as one cell with their mean. guessing: accuracy of
    guessing on every task, for a last row; empty where it is unknown. numbers: those of the tasks;
    default: from 0.
    """
    numbers = numbers or range(len(names))
    group = 1 if len(names) <= WHOLE else math.ceil(len(names) / BLOCKS)
    spans = [range(first, min(first + group, len(names))) for first in range(0, len(names), group)]
    if group > 1:
        names = [f"{names[span[0]]} to {names[span[-1]]}" for span in spans]
        accuracy_TT = _block_means(accuracy_TT, spans)
        guessing = [float(np.mean([guessing[task] for task in span])) for span in spans
                    ] if guessing else ()
    n_tasks = len(names)
    with_text, narrow = n_tasks <= most, n_tasks <= NARROW
    left = 108.0 if with_text else 66.0
    cell = (WIDTH - left) / n_tasks if narrow or not with_text else 30.0
    high = min(cell, 36.0)
    width, top = left + cell * n_tasks, 34.0
    low, step = heat_scale(np.concatenate([accuracy_TT.flatten(), guessing]))
    body = [text(max(left, 76), 12, "accuracy on task →"), text(0, 12, "after task ↓")]
    every = 1 if with_text else tick_step(len(spans) * group) // group or 1
    for j in range(0, n_tasks, every):
        body.append(text(left + (j + 0.5) * cell, top - 7, numbers[spans[j][0]], anchor="middle"))
        label = str(numbers[spans[j][0]])
        if with_text:
            label = shorten(row_label(numbers[j], names[j]), 14)
        body.append(f"<g><title>{escape(names[j])}</title>"
                    + text(left - 8, top + (j + 0.5) * high + 4, label, anchor="end") + "</g>")
    draw = _Cells(left, top, cell, high, low, step, 1.5 if with_text else 0.0,
                  (1 if narrow else 0) if with_text else None)
    body += [draw.cell(i, j, accuracy_TT[i, j], f"after {names[i]}: "
                       f"{100 * accuracy_TT[i, j]:.1f} % on {names[j]}")
             for i in range(n_tasks) for j in range(i + 1)]
    bottom = top + high * n_tasks
    if guessing:
        draw = dataclasses.replace(draw, top=bottom + 8, high=max(high, 16.0))
        body.append(text(left - 8, bottom + 12 + draw.high / 2, "guessing", anchor="end"))
        body += [draw.cell(0, j, share, f"guessing: {100 * share:.1f} % on {names[j]}")
                 for j, share in enumerate(guessing)]
        bottom += 8 + draw.high
    body.append(_heat_legend(left, bottom + 12, min(width - left, 300.0), low, step))
    return svg(key, "Accuracy matrix", description, bottom + 42, body, width)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """The cells of a heat map: place and size, colour scale, decimals of numbers (None: none)."""

    left: float
    top: float
    wide: float
    high: float
    low: float
    step: float
    gap: float
    digits: int | None

    def cell(self, i: int, j: int, share: float, tip: str) -> str:
        """One cell in row i and column j, with a tooltip."""
        shade = min(HEAT_BINS - 1, max(0, int((share - self.low) / self.step + 1e-9)))
        x, y = self.left + j * self.wide, self.top + i * self.high
        drawn = (f'<rect x="{number(x)}" y="{number(y)}" width="{self.wide - self.gap:.2f}" '
                 f'height="{self.high - self.gap:.2f}" class="h{shade}"/>')
        if self.digits is not None:
            drawn += text(x + (self.wide - self.gap) / 2, y + (self.high - self.gap) / 2 + 4,
                          f"{100 * share:.{self.digits}f}", f"cell t{shade}", "middle")
        return f"<g><title>{escape(tip)}</title>{drawn}</g>"


def _block_means(accuracy_TT: npt.NDArray[np.float64],
                 spans: Sequence[range]) -> npt.NDArray[np.float64]:
    """The mean of what was measured in every block of tasks; NaN above the diagonal."""
    means = np.full((len(spans), len(spans)), np.nan)
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans[:i + 1]):
            means[i, j] = np.nanmean(accuracy_TT[rows[0]:rows[-1] + 1,
                                                 columns[0]:columns[-1] + 1])
    return means


def row_label(index: int, name: str) -> str:
    return name if name == str(index) else f"{index} {name}"


def heat_scale(accuracy_TT: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Lower end and bin width of the colour scale: whole tenths that hold all values."""
    low = math.floor(10 * float(np.nanmin(accuracy_TT)) + 1e-9) / 10
    high = max(math.ceil(10 * float(np.nanmax(accuracy_TT)) - 1e-9) / 10, 0.1)
    low = max(0.0, min(low, high - 0.1))
    return low, (high - low) / HEAT_BINS


def _heat_legend(x: float, y: float, width: float, low: float, step: float) -> str:
    swatch = width / HEAT_BINS
    marks = [f'<rect x="{number(x + i * swatch)}" y="{number(y)}" width="{swatch:.2f}" '
             f'height="8" class="h{i}"/>' for i in range(HEAT_BINS)]
    ends = [(x, low, "start"), (x + width / 2, low + 5 * step, "middle"),
            (x + width, low + 10 * step, "end")]
    marks += [text(at, y + 22, f"{100 * value:.3g} %", anchor=anchor)
              for at, value, anchor in ends]
    return "".join(marks)


def line_chart(key: str, title: str, description: str, lines: Sequence[Line],
               y_ticks: Sequence[float], tick_format: str, x_ticks: Sequence[tuple[float, str]],
               x_label: str, right: float = 12, borders: Sequence[float] = ()) -> str:
    """Lines over a common x; `borders` are thin vertical rules, `right` is room for labels."""
    left, top, height, bottom = 46.0, 14.0, 250.0, 214.0
    xs = [x for line in lines for x, _ in line.points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x_low) / (x_high - x_low) * (WIDTH - right - left),
                bottom - (y - y_low) / (y_high - y_low) * (bottom - top))

    body = []
    for border in borders:
        x, _ = place(border, y_low)
        body.append(f'<path class="rule" d="M{number(x)} {number(top)}V{number(bottom)}"/>')
    for tick in y_ticks:
        _, y = place(x_low, tick)
        body.append(f'<path class="grid" d="M{number(left)} {number(y)}H{number(WIDTH - right)}"/>')
        body.append(text(left - 6, y + 4, _tick(tick_format, tick), anchor="end"))
    for at, label in x_ticks:
        body.append(text(place(at, y_low)[0], bottom + 16, label, anchor="middle"))
    body.append(text((left + WIDTH - right) / 2, height - 3, x_label, anchor="middle"))
    body += [_line(line, [place(x, y) for x, y in line.points]) for line in lines]
    ends = [(place(*line.points[-1])[1], line) for line in lines if line.label]
    x_end = WIDTH - right + 7
    body += [text(x_end, y + 4, line.label, f"lb {line.css}-t")
             for y, line in _spread(ends, top, bottom)]
    return svg(key, title, description, height, body)


def _tick(tick_format: str, value: float) -> str:
    """The text of a tick; per cent as everywhere on the page: 57 %."""
    return tick_format.format(value).replace("%", " %")


def _line(line: Line, spots: Sequence[tuple[float, float]]) -> str:
    path = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in spots)
    x, y = spots[-1]
    single = (f'<circle class="{line.css}-f" cx="{number(x)}" cy="{number(y)}" r="2.6"/>'
              if line.label or len(spots) == 1 else "")
    return (f"<g><title>{escape(line.tooltip)}</title>"
            f'<path class="ln {line.css}" d="{path}"/>{single}</g>')


def _spread(ends: Sequence[tuple[float, Line]], top: float, bottom: float,
            gap: float = 13.5) -> list[tuple[float, Line]]:
    """Moves labels apart so that none covers another, keeping their order."""
    ordered = sorted(ends, key=lambda end: end[0])
    placed: list[float] = []
    for y, _ in ordered:
        placed.append(max(y, placed[-1] + gap) if placed else max(y, top))
    limit = bottom
    for k in range(len(placed) - 1, -1, -1):
        placed[k] = min(placed[k], limit)
        limit = placed[k] - gap
    return [(y, line) for y, (_, line) in zip(placed, ordered, strict=True)]


def bar_chart(key: str, title: str, description: str, bars: Sequence[Bar], longest: float,
              limit: tuple[float, str] | None = None, right: float = 76) -> str:
    """Horizontal bars with their number beside them; `limit` is a marked value and its name."""
    left, row, top = 112.0, 22.0, 22.0 if limit else 6.0
    scale = (WIDTH - right - left) / max(longest, 1e-9)
    bottom = top + row * len(bars)
    body = [f'<path class="base" d="M{number(left)} {number(top)}V{number(bottom)}"/>']
    for k, bar in enumerate(bars):
        y, x = top + k * row, left
        marks = []
        for value, css in bar.parts:
            length = max(value * scale, 0.0)
            marks.append(f'<rect x="{number(x)}" y="{number(y + 4)}" width="{length:.2f}" '
                         f'height="{number(row - 8)}" class="{css}"/>')
            x += length
        body.append(f"<g><title>{escape(bar.tooltip)}</title>"
                    + text(left - 8, y + 15, shorten(bar.label, 15), "ax ink", "end")
                    + "".join(marks) + text(x + 6, y + 15, bar.text, "ax ink halo") + "</g>")
    if limit:
        x = left + limit[0] * scale
        body.append(text(x, top - 9, limit[1], anchor="middle"))
        body.append(f'<path class="limit" d="M{number(x)} {number(top - 4)}V{number(bottom)}"/>')
    return svg(key, title, description, bottom + 4, body)


def column_chart(key: str, title: str, description: str, bars: Sequence[Bar],
                 tick_format: str, x_label: str) -> str:
    """Stacked columns along the stream, one a task, however many there are."""
    left, top, height, bottom, right = 44.0, 14.0, 250.0, 214.0, 12.0
    ticks = nice_ticks(0, max([sum(v for v, _ in bar.parts) for bar in bars] + [1e-3]))
    pitch = (WIDTH - right - left) / len(bars)
    gap = pitch * 0.3 if len(bars) <= 40 else pitch * 0.12
    thick = min(pitch - gap, 42.0)
    body = []
    for tick in ticks:
        y = bottom - tick / ticks[-1] * (bottom - top)
        body.append(f'<path class="grid" d="M{number(left)} {number(y)}H{number(WIDTH - right)}"/>')
        body.append(text(left - 6, y + 4, _tick(tick_format, tick), anchor="end"))
    every = tick_step(len(bars))
    for k, bar in enumerate(bars):
        x, y = left + (k + 0.5) * pitch - thick / 2, bottom
        marks = []
        for value, css in bar.parts:
            tall = value / ticks[-1] * (bottom - top)
            y -= tall
            marks.append(f'<rect x="{x:.2f}" y="{y:.2f}" width="{thick:.2f}" '
                         f'height="{tall:.2f}" class="{css}"/>')
        body.append(f"<g><title>{escape(bar.tooltip)}</title>{''.join(marks)}</g>")
        if k % every == 0:
            body.append(text(x + thick / 2, bottom + 16, k, anchor="middle"))
    body.append(text((left + WIDTH - right) / 2, height - 3, x_label, anchor="middle"))
    return svg(key, title, description, height, body)
