"""The columns of images and labels in Parquet files and in tables beside images.

A column is used by the option that names it, else by its usual name, else by its type in the
schema metadata that the Hugging Face libraries write. Where two columns would do, neither is
guessed: the option has to name one.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from partialhn.errors import InputError

IMAGE_COLUMNS = ("image", "img")
"""Names that a column of encoded images usually has."""
LABEL_COLUMNS = ("label", "labels", "fine_label")
"""Names that a column of labels usually has."""

SPLIT_COLUMN = "split"
"""A column that many tables have, and that is not used."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """The columns that the options `image_column` and `label_column` name; None: by their names."""

    image: str | None = None
    label: str | None = None


ANY = Columns()
"""Columns that are chosen by their names."""


def choose(option: str, chosen: str | None, names: Sequence[str], usual: Sequence[str],
           typed: Sequence[str], path: str) -> str | None:
    """The column that is used; None where no column has a usual name or type.

    Args:
        option: the option that names a column, for messages.
        chosen: its value.
        names: all columns.
        usual: names that such a column usually has.
        typed: columns of which the metadata says that they are of this kind.
        path: the file, for messages.

    Raises: InputError for a chosen column that does not exist, or where several would do.
    """
    if chosen is not None:
        if chosen not in names:
            raise InputError(f"{option} is {chosen!r}; allowed: a column of {path}, which has "
                             f"{', '.join(names) or 'none'}")
        return chosen
    candidates = [name for name in usual if name in names] or list(typed)
    if len(candidates) > 1:
        raise InputError(f"{path} has the columns {' and '.join(candidates)}, and it is not clear "
                         f"which one to use; allowed: {option} with one of these names")
    return candidates[0] if candidates else None


def split_notes(values: Iterable[object], path: str) -> list[str]:
    """A note where the column `split` of a table names several splits: it is not used.

    values: of that column; none where there is no such column.
    """
    named = sorted({str(value) for value in values if value is not None})
    if len(named) < 2:
        return []
    return [f"the column {SPLIT_COLUMN!r} of {path} ({', '.join(named[:5])}) is not used; folders "
            "and names of files say which split an image is in"]


def image_field(schema: Any, path: str, chosen: str | None = None) -> Any:
    """The field of the Parquet column of encoded images.

    Raises: InputError where there is none, several, or one of another type.
    """
    name = choose("image_column", chosen, schema.names, IMAGE_COLUMNS,
                  _typed(schema, "Image", path), path)
    if name is None:
        raise InputError(f"{path} has columns {', '.join(schema.names) or 'none'}; it needs a "
                         f"column of encoded images named {' or '.join(IMAGE_COLUMNS)}, or "
                         "image_column with the name of one")
    field = schema.field(name)
    kind = field.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise InputError(f"column {name!r} of {path} has type {field.type}; allowed: "
                         "encoded images as binary, or a struct with binary 'bytes'")
    return field


def label_field(schema: Any, path: str, chosen: str | None = None) -> Any:
    """The field of the Parquet column of labels. Raises: InputError for none, or several."""
    name = choose("label_column", chosen, schema.names, LABEL_COLUMNS,
                  _typed(schema, "ClassLabel", path), path)
    if name is None:
        raise InputError(f"{path} has columns {', '.join(schema.names)}; it needs a column of "
                         f"labels named {' or '.join(LABEL_COLUMNS)}, or label_column with the "
                         "name of one")
    return schema.field(name)


def features_of(metadata: Mapping[bytes, bytes] | None, path: str) -> dict[str, Any]:
    """The columns' types in the schema metadata that the Hugging Face libraries write, by column.

    Metadata of another shape says nothing. Raises: InputError for metadata that is no JSON.
    """
    try:
        fields: Any = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    except ValueError as error:
        raise InputError(f"the schema metadata 'huggingface' of {path} is not JSON: {error}"
                         ) from error
    for key in ("info", "features"):
        fields = fields.get(key) if isinstance(fields, dict) else None
    return fields if isinstance(fields, dict) else {}


def class_names(names: Any, path: str) -> tuple[str, ...] | None:
    """Class names from outside: a list, or a mapping of all indices from 0; None for none.

    Raises: InputError for names of another shape, or a name that occurs twice.
    """
    if isinstance(names, dict):
        names = {str(number): name for number, name in names.items()}
        indices = {str(number) for number in range(len(names))}
        if names.keys() != indices:
            raise InputError(f"class names of {path} are numbered {', '.join(sorted(names)[:5])}; "
                             f"allowed: 0 to {len(names) - 1}")
        names = [names[str(number)] for number in range(len(names))]
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise InputError(f"class names of {path} are {names!r:.100}; allowed: a list of names")
    texts = tuple(map(str, names))
    twice = [text for text, count in collections.Counter(texts).items() if count > 1]
    if twice:
        raise InputError(f"class names of {path} have {twice[0]!r} twice; allowed: a name for "
                         "each class")
    return texts


def _typed(schema: Any, kind: str, path: str) -> list[str]:
    """The columns that the metadata gives a type, such as Image or ClassLabel."""
    return [name for name, feature in features_of(schema.metadata, path).items()
            if isinstance(feature, dict) and feature.get("_type") == kind
            and name in schema.names]
