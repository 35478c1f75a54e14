"""Tables and sentences as plain text."""

import unicodedata
from collections.abc import Sequence

from partialhn.numbers import percent

MEANS = ("accuracy, when learned, forgotten: means over all tasks that the version of the row "
         "knows")
"""Says below a table of versions that its numbers are not those of the row's task alone."""


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines of text with aligned columns."""
    widths = [max(map(shown_width, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(padded, row, widths)).rstrip() for row in rows]


def padded(text: str, width: int) -> str:
    """The text with spaces behind it, up to so many columns of a terminal."""
    return text + " " * (width - shown_width(text))


def shown_width(text: str) -> int:
    """Columns of a terminal that a text takes: two for a wide letter, none for an accent."""
    return sum(0 if unicodedata.combining(letter)
               else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def auto_line(accuracy: Sequence[float | None] | None) -> str:
    """How often task auto is right, in words.

    accuracy: shares of test images whose task was found, that got the right class, that got it
    with the task given, and that are taken for images of no known task (None, or missing, where
    that is not recorded); None where nobody measured it.
    """
    if accuracy is None:
        return "task auto: how often it is right was not measured for this model"
    task, right, given, rejected = (*accuracy, None)[:4]
    line = (f"task auto finds the right task for {percent(task)} of this stream's test images and "
            f"the right class for {percent(right)}; with the task given, {percent(given)}")
    return line if rejected is None else (
        f"{line}; these shares count every image, but it takes {percent(rejected)} of them for "
        "images of no known task and gives those no label")
