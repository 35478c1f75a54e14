"""Settings that do not change the learned model: a stream's name, storage, MLflow server and files.

`partialhn.config.Config` holds the settings that do. This file imports nothing heavy, so that
`--help` is fast.
"""

import dataclasses
import re
from typing import Any, ClassVar

from partialhn.errors import InputError

MAX_NAME = 200
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """The names and places of a run's results."""

    name: str = "stream"
    """Name of the stream and of its registered model: letters, digits, _ and - only. A run with
    the same name goes on from what the stream's champion has learned."""
    storage: str = "partialhn-store"
    """Folder or s3://bucket/prefix for features, checkpoints and models. S3 takes
    ?endpoint=URL&region=NAME&path_style=true after it."""
    tracking_uri: str | None = None
    """MLflow tracking server or database; default: MLFLOW_TRACKING_URI, or else mlflow.db
    (SQLite) in the storage folder (in the working folder if the storage is S3)."""
    result: str = "result.json"
    """File for the result as JSON."""
    replace: bool = False
    """Let the model of this run become champion although it leaves out, or learns again, tasks
    that the champion knows. Without it such a run is refused before anything is trained."""

    def __post_init__(self) -> None:
        check_name(self.name)
        for key in ("storage", "result"):
            if not getattr(self, key):
                raise InputError(f"{key} is ''; allowed: a path" +
                                 (" or s3://bucket/prefix" if key == "storage" else ""))


@dataclasses.dataclass(frozen=True)
class RetrainConfig:
    """The settings of one pass over a stream's inbox."""

    name: str = "stream"
    """Name of the stream and of its registered model. The first pass starts the stream; its
    network, hypernetwork and features cannot be changed later."""
    storage: str = "partialhn-store"
    """Folder or s3://bucket/prefix; tasks arrive in <storage>/inbox/<task>/, as train/ and test/
    image folders or Parquet files with the marker _READY written last."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    policy: str | None = None
    """YAML file with the limits for new versions and, in its section inbox, for arriving tasks."""
    config: str | None = None
    """YAML file of the stream's configuration, as for train; default: that of the first pass."""
    preset: str | None = None
    """Name of a known configuration, instead of --config."""
    quiet_minutes: float | None = None
    """A folder without a _READY marker is ready if nothing in it has changed for so long."""
    learn_again: tuple[str, ...] = ()
    """Names of tasks to learn again from the inbox, which were forgotten (`partialhn models
    forget-task`) or rolled back. What the champion knows is left as it is, so a pass may repeat
    the option."""
    re_evaluate: bool = False
    """Measure every earlier task again, although nothing that it depends on has changed."""
    dry_run: bool = False
    """Print the actions of a pass without taking them."""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.config and self.preset:
            raise InputError("--config and --preset are both given; allowed: one of them")
        if self.quiet_minutes is not None and self.quiet_minutes < 0:
            raise InputError(f"quiet_minutes is {self.quiet_minutes}; allowed: 0 or more")


def check_name(name: str) -> str:
    """Returns the stream name if MLflow allows it for models and aliases.

    Raises: InputError with the allowed characters.
    """
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise InputError(f"name is {name!r}; allowed: letters, digits, _ and -, a letter or digit "
                         f"first, at most {MAX_NAME} characters, for example my-stream")
    return name


def mask_password(text: str) -> str:
    """Hides the password of a URI such as postgresql://user:password@host/database."""
    return re.sub(r"(://[^/\s:@]*):[^/\s]+@", r"\1:***@", text)


class Group:
    """A group of commands, such as `partialhn features list | verify`.

    The docstring of a subclass is the group's help; its COMMANDS are the commands' classes.
    """

    COMMANDS: ClassVar[dict[str, Any]] = {}
