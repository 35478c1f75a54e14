"""Labels in a table beside the images: `metadata.csv`, `metadata.jsonl` or `metadata.parquet`.

A row names an image file below the table's folder and gives its label. Nothing is converted on
the way: the code 007 of a CSV file stays text, and each label belongs to one file that exists.
"""

import collections
import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from partialhn.data.columns import (
    LABEL_COLUMNS,
    SPLIT_COLUMN,
    Columns,
    choose,
    class_names,
    features_of,
    split_notes,
)
from partialhn.data.image_table import sound
from partialhn.data.listing import is_metadata
from partialhn.errors import InputError

FILE_COLUMN = "file_name"
"""The column of file names; another column may end with it, such as `image_file_name`."""
Label = str | int


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of image files by path, and what else is known about the tables."""

    by_path: Mapping[str, Label]
    tables: tuple[str, ...]
    """Paths of the tables that were used."""
    column: str
    """The column of labels of the last table."""
    names: tuple[str, ...] | None = None
    """Class names by label, where a Parquet table says them."""
    notes: tuple[str, ...] = ()
    """What the tables say that is not used."""


@dataclasses.dataclass(frozen=True)
class _Table:
    columns: list[str]
    rows: list[Mapping[str, Any]]
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Class names by column."""


def read_labels(filesystem: Any, root: str, listing: Sequence[str], columns: Columns,
                described: Mapping[str, tuple[str, ...]]) -> Labels | None:
    """The labels that tables in a data set's folder give; None where no table has labels.

    A table without a column of labels, such as one of captions, gives none.

    Args:
        filesystem: where the folder is.
        root: the folder.
        listing: all paths in it.
        columns: the columns that options name.
        described: class names by column, as the data set's README.md says them.

    Raises: InputError for a row without a file or label, or a file with two rows.
    """
    by_path: dict[str, Label] = {}
    used, column, names, notes = [], "", None, list[str]()
    files = {path for path in listing if not path.endswith("/")}
    for path in sorted(filter(is_metadata, files)):
        table = _read(filesystem, f"{root}/{path}")
        label = choose("label_column", columns.label, table.columns,
                       [*described, *(name for name in LABEL_COLUMNS if name not in described)],
                       list(table.names), f"{root}/{path}")
        if label is None:
            continue
        base = path[:path.rfind("/") + 1]
        rows = _labelled(table, f"{root}/{path}", columns, label)
        _check_files(f"{root}/{path}", [base + name for name, _ in rows], files, by_path)
        by_path |= {base + name: value for name, value in rows}
        used.append(path)
        notes += split_notes((row.get(SPLIT_COLUMN) for row in table.rows), path)
        column, names = label, table.names.get(label, described.get(label))
    if not used:
        return None
    return Labels(_numbered(by_path), tuple(used), column, names, tuple(notes))


def table_without_labels(filesystem: Any, root: str, listing: Sequence[str]) -> str:
    """What the first table in a data set's folder lacks, where `read_labels` finds no labels; empty
    where there is no table.
    """
    path = next(filter(is_metadata, sorted(listing)), None)
    if path is None:
        return ""
    columns = _read(filesystem, f"{root}/{path}").columns
    return (f"{root}/{path} has columns {', '.join(map(repr, columns)) or 'none'}; it needs a "
            f"column of labels named {' or '.join(LABEL_COLUMNS)}, or label_column with its name, "
            "and commas between the cells of a .csv")


def _read(filesystem: Any, path: str) -> _Table:
    with filesystem.open_input_file(path) as source:
        content = bytes(source.readall())
    kind = path.lower().rpartition(".")[2]
    with sound(path, kind):
        return {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}[kind](content, path)


def _labelled(table: _Table, path: str, columns: Columns, label: str) -> list[tuple[str, Label]]:
    """File name and label of each row."""
    ends = [name for name in table.columns if name.endswith(f"_{FILE_COLUMN}")]
    file = choose("image_column", columns.image, table.columns, [FILE_COLUMN], ends, path)
    if file is None:
        raise InputError(f"{path} has columns {', '.join(table.columns)}; it needs a column "
                         f"{FILE_COLUMN} with the names of the images, or image_column with its "
                         "name")
    return [(_name(row.get(file), path, number), _label(row.get(label), label, path, number))
            for number, row in enumerate(table.rows)]


def _csv(content: bytes, path: str) -> _Table:
    lines = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    try:
        rows: list[Mapping[str, Any]] = list(lines)
    except csv.Error as error:
        raise InputError(f"{path} is no readable csv file: {error}") from error
    columns = list(lines.fieldnames or ())
    if len(set(columns)) < len(columns):
        raise InputError(f"{path} has two columns of one name ({', '.join(columns)}); allowed: "
                         "different names")
    for number, row in enumerate(rows):
        if None in row:
            raise InputError(f"row {number} of {path} has more cells than the {len(columns)} of "
                             "the first line; allowed: quotes around a cell with a comma")
    return _Table(columns, rows)


def _jsonl(content: bytes, path: str) -> _Table:
    rows = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"row {number} of {path} is {row!r:.50}; allowed: a JSON object a "
                             "line")
    return _Table(list(dict.fromkeys(name for row in rows for name in row)), rows)


def _parquet(content: bytes, path: str) -> _Table:
    table = pq.read_table(pa.BufferReader(content))
    features = features_of(table.schema.metadata, path)
    listed = {name: class_names(feature.get("names"), path) for name, feature in features.items()
              if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"}
    return _Table(table.schema.names, table.to_pylist(),
                  {name: names for name, names in listed.items() if names is not None})


def _name(value: object, path: str, number: int) -> str:
    """A file's path below its table's folder. Raises: InputError for one that leaves it."""
    steps = value.removeprefix("./").split("/") if isinstance(value, str) else []
    if not steps or any(step in ("", ".", "..") for step in steps):
        raise InputError(f"row {number} of {path} names the file {value!r}; allowed: the path of a "
                         "file below the table's folder")
    return "/".join(steps)


def _label(value: object, column: str, path: str, number: int) -> Label:
    if value is None or value == "":
        raise InputError(f"row {number} of {path} has no {column}; allowed: a label in every row")
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int) or (isinstance(value, int) and value < 0):
        raise InputError(f"{column} of row {number} of {path} is {value!r:.50}; allowed: a name, "
                         "or a whole number from 0")
    return value


def _check_files(path: str, names: Sequence[str], files: Iterable[str],
                 earlier: Mapping[str, Label]) -> None:
    missing = sorted(set(names).difference(files))
    if missing:
        raise InputError(f"{path} has {len(missing):,} rows whose file is not there, the first is "
                         f"{missing[0]}; allowed: a file for every row")
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    twice += [name for name in names if name in earlier]
    if twice:
        raise InputError(f"{path} names {twice[0]} although another row names it; allowed: a row "
                         "for each file")


def _numbered(by_path: Mapping[str, Label]) -> Mapping[str, Label]:
    """Labels of one type: numbers where each is written as a number is, as 7 and not as 007.

    Raises: InputError where text stands beside numbers.
    """
    texts = [label for label in by_path.values() if isinstance(label, str)]
    if texts and len(texts) < len(by_path):
        raise InputError(f"labels are text ({texts[0]!r}) in some rows and numbers in others; "
                         "allowed: one of both")
    if all(re.fullmatch(r"0|[1-9][0-9]{0,15}", text) for text in texts):
        return {path: int(label) for path, label in by_path.items()}
    return by_path
