"""Where a stream's results go: its name, its storage, its MLflow server, its result file.

What is learned is in `partialhn.config.Config`; nothing here changes it. Nothing heavy is
imported, so that `--help` answers at once.
"""

import dataclasses
import re
from typing import Any, ClassVar

from partialhn.errors import InputError

MAX_NAME = 200
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Where everything a run makes is put."""

    name: str = "stream"
    """Name of the stream and of its registered model: letters, digits, _ and - only. The same
    name and configuration go on where an earlier run stopped."""
    storage: str = "partialhn-store"
    """Folder or s3://bucket/prefix for features, checkpoints and models. S3 takes
    ?endpoint=URL&region=NAME&path_style=true after it."""
    tracking_uri: str | None = None
    """MLflow tracking server or database; default: MLFLOW_TRACKING_URI, or else mlflow.db
    (SQLite) in the storage folder (in the working folder when the storage is S3)."""
    result: str = "result.json"
    """File for the machine-readable result."""

    def __post_init__(self) -> None:
        check_name(self.name)
        for key in ("storage", "result"):
            if not getattr(self, key):
                raise InputError(f"{key} is ''; allowed: a path" +
                                 (" or s3://bucket/prefix" if key == "storage" else ""))


def check_name(name: str) -> str:
    """Returns the stream name when MLflow's model names and aliases take it.

    Raises: InputError naming what is allowed.
    """
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise InputError(f"name is {name!r}; allowed: letters, digits, _ and -, a letter or digit "
                         f"first, at most {MAX_NAME} characters, for example my-stream")
    return name


def mask_password(text: str) -> str:
    """Hides the password of a URI such as postgresql://user:password@host/database."""
    return re.sub(r"(://[^/\s:@]*):[^/\s]+@", r"\1:***@", text)


class Group:
    """Commands that belong together, such as `partialhn features list | verify`: a command class
    whose docstring is the group's help and whose COMMANDS are the classes behind the words.
    """

    COMMANDS: ClassVar[dict[str, Any]] = {}
