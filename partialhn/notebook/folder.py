"""A `Stream`'s folder belongs to one configuration and the tasks of one data set.

`stream.json` in it holds the configuration, and the name and fingerprint of every task. Beside it
`partialhn.run` keeps datasets/, trunks/, features/ and learned/.
"""

import json
from pathlib import Path
from typing import Any

from partialhn.config import Config
from partialhn.data.experience import Experience
from partialhn.errors import InputError, IntegrityError
from partialhn.json_files import read_object
from partialhn.notebook.options import differences
from partialhn.predict import STREAM

FORMAT = 1


def stored_fields(folder: Path) -> dict[str, Any] | None:
    """The content of `stream.json`; None for a new folder. Raises: InputError, IntegrityError."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"folder {str(folder)!r} is a file; allowed: a folder, or a new path")
    path = folder / STREAM
    if not path.exists():
        return None
    fields = read_object(path, str(path))
    try:
        if fields["format"] != FORMAT:
            raise IntegrityError(f"{path} has format {fields['format']!r}; allowed: {FORMAT}")
        return {"config": dict(fields["config"]),
                "tasks": [tuple(map(str, task)) for task in fields["tasks"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error!r}") from error


def check_config(folder: Path, stored: dict[str, Any] | None, config: Config) -> None:
    """Raises InputError where the folder was used with options that learn something else."""
    if stored and (found := differences(config, stored["config"])):
        raise InputError(f"folder {str(folder)!r} holds a stream with other options: "
                         f"{'; '.join(found)}. Allowed: the same options, or another folder")


def claim(folder: Path, stored: dict[str, Any] | None, config: Config,
          experiences: list[Experience]) -> None:
    """Writes `stream.json`. Tasks may be added behind those that the folder knows.

    Raises: InputError where an earlier task has other images.
    """
    tasks = [(each.name, each.fingerprint) for each in experiences]
    for index, known in enumerate(stored["tasks"] if stored else []):
        if tasks[index:index + 1] != [known]:
            raise InputError(f"folder {str(folder)!r} holds a stream of other images: its task "
                             f"{index} was {known[0]!r}. Allowed: the same images, with new tasks "
                             "after the old ones, or another folder")
    text = json.dumps({"format": FORMAT, "config": config.to_dict(), "tasks": tasks}, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{STREAM}.draft"
    draft.write_text(text, encoding="utf-8")
    draft.replace(folder / STREAM)
