"""Tables and sentences as plain text."""

from collections.abc import Sequence

from partialhn.numbers import percent

MEANS = ("accuracy, when learned, forgotten: means over all tasks that the version of the row "
         "knows")
"""Says below a table of versions that its numbers are not those of the row's task alone."""


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]


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
