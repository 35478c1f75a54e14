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


@dataclasses.dataclass(frozen=True)
class RetrainConfig:
    """One pass over a stream's inbox."""

    name: str = "stream"
    """Name of the stream and of its registered model. The first pass founds the stream: its
    network, hypernetwork and features stay as they are from then on."""
    storage: str = "partialhn-store"
    """Folder or s3://bucket/prefix; tasks arrive in <storage>/inbox/<task>/, as train/ and test/
    image folders or Parquet files with the marker _READY written last."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    policy: str | None = None
    """YAML file of limits that a new version, and (section inbox) what arrives, must keep to."""
    config: str | None = None
    """YAML file of the stream's configuration, as for train; default: that of the first pass."""
    preset: str | None = None
    """A known configuration by name, in place of --config."""
    quiet_minutes: float | None = None
    """Without a _READY marker a folder is ready when nothing in it changed for so long."""
    dry_run: bool = False
    """Say what would be done; change nothing."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.config and self.preset:
            raise InputError("--config and --preset are given; allowed: one of them")
        if self.quiet_minutes is not None and self.quiet_minutes < 0:
            raise InputError(f"quiet_minutes is {self.quiet_minutes}; allowed: 0 or more")


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
