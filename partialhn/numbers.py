"""How numbers are written for people: one form of each, on pages, in tables and in a terminal.

Sizes have decimal units (1 kB is 1000 bytes), and an ordinary space stands before every unit.
The only binary unit is the GiB of options that carry it in their names (`--cache-gib`,
`--price-gib-month`) and of the free space that is compared with them.
"""

import datetime
import math

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September",
          "October", "November", "December")
UNKNOWN = "–"
"""The sign in place of a number that was not measured."""


def counted(number: int, noun: str) -> str:
    """A number and what it counts: 1 image, 1,200 images."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 as per cent: 0.512 -> 51.2 %."""
    if share is None or math.isnan(share):
        return UNKNOWN
    return f"{100 * share:.{digits}f} %"


def points(share: float | None, signed: bool = False) -> str:
    """A difference of two shares in percentage points, without a unit and with a real minus sign:
    -0.061 -> −6.1.
    """
    if share is None:
        return UNKNOWN
    text = f"{100 * share:+.1f}" if signed else f"{100 * share:.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def in_points(share: float) -> str:
    """`points` with the unit: 0.061 -> 6.1 points."""
    text = points(share)
    return f"{text} point" if text == "1.0" else f"{text} points"


def margin(mean: float, low: float | None) -> str:
    """Half the width of an interval in points: ± 0.5; empty where there is no interval."""
    return "" if low is None else f" ± {100 * (mean - low):.1f}"


def percent_with_margin(mean: float, low: float | None) -> str:
    """A mean and its interval: 80.1 ± 0.2 %; without an interval the mean alone."""
    return f"{100 * mean:.1f}{margin(mean, low)} %"


def percent_with_interval(mean: float, low: float, high: float) -> str:
    """An accuracy and its interval, which ends at 0 and 100 %: 61.1 % (30.4 to 91.9)."""
    return f"{percent(mean)} ({points(max(0.0, low))} to {points(min(1.0, high))})"


def duration(seconds: float | None) -> str:
    """A time in the units a person would use: 3.2 s, 45 s, 2 min 5 s, 3 h 10 min."""
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 119.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(n_bytes: float | None) -> str:
    """Bytes in the unit a person would use: 12 B, 4.5 kB, 207 MB, 1.3 GB."""
    if n_bytes is None:
        return UNKNOWN
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    power = next((p for p in (1, 2, 3) if n_bytes < 999.5 * 1000 ** p), 4)
    value, unit = n_bytes / 1000 ** power, ("kB", "MB", "GB", "TB")[power - 1]
    return f"{value:.1f} {unit}" if value < 99.5 else f"{value:.0f} {unit}"


def now() -> str:
    """The time, as results keep it: 2026-11-27T15:04Z."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ")


def date(time: str | None) -> str:
    """A time of `now` for people: 27 November 2026, 15:04 UTC. Empty where there is none."""
    if not time:
        return ""
    try:
        found = datetime.datetime.strptime(time, "%Y-%m-%dT%H:%MZ")
    except (TypeError, ValueError):
        return ""
    return f"{found.day} {MONTHS[found.month - 1]} {found.year}, {found:%H:%M} UTC"
