"""JSON files that hold one object."""

import json
from pathlib import Path
from typing import Any

from partialhn.errors import IntegrityError


def parse_object(content: str | bytes, name: str) -> dict[str, Any]:
    """The fields of a JSON object; `name` says in messages what the content belongs to.

    Raises: IntegrityError for content that is no JSON, or JSON that is no object.
    """
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{name} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise IntegrityError(f"{name} holds {type(fields).__name__}; expected a JSON object")
    return fields


def read_object(path: Path, name: str) -> dict[str, Any]:
    """`parse_object` of a local file.

    Raises: IntegrityError, also for a file that is missing or cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        file = "" if name.endswith(path.name) else f"{path.name}: "
        raise IntegrityError(f"{name} cannot be read: {file}{error.strerror}") from error
    return parse_object(content, name)
