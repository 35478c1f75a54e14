"""The table of data forms that the option `data` names, as digits, torchvision:NAME or hf:NAME.

A form is a function `(argument, cache_dir) -> folder`: it takes what stands after the colon, writes
the data set once below `cache_dir`, and returns a folder (a path, or a `Folder`) that
`partialhn.data.layout` reads, such as Parquet files from `partialhn.data.library.write_parquet`.
Other packages add lines with `register_data_form` or with an entry point of the group
`partialhn.data`. Everything that the table does not name is the path of a data set.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from partialhn.errors import InputError
from partialhn.plugins import Table, load_object

FORMS: Table[object] = Table("data", "partialhn.data", {
    "digits": "partialhn.data.library:digits_form",
    "torchvision": "partialhn.data.library:convert_torchvision",
    "hf": "partialhn.data.hub:open_hub",
}, lambda _name, value: value)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The folder with the images of a data form."""

    path: Path
    chosen: str | None = None
    """The configuration of a data set whose README.md has several; None: the only or default
    one."""
    is_converted: bool = True
    """Whether the form wrote the folder; else it is the user's own, and is read where it lies."""


def register_data_form(name: str, source: str | Callable[[str, Path], Path]) -> None:
    """Makes a data form known in this process: `data` may then be NAME or NAME:ARGUMENT.

    Args:
        name: the word before the colon.
        source: the function, or where it is, as module:function.

    Raises: InputError for a name that is taken.
    """
    FORMS.register(name, source)


def is_form(data: str) -> bool:
    """Whether `data` names a form of the table, and is not a path or URI."""
    name, _, argument = data.partition(":")
    return not argument.startswith("//") and name in FORMS


def converted_folder(data: str, cache_dir: Path) -> Folder | None:
    """The folder that a form of the table gives for `data`; None where `data` is a path.

    Raises: InputError for a form that cannot be imported or gives no folder, or an argument that it
        refuses.
    """
    if not is_form(data):
        return None
    name, _, argument = data.partition(":")
    line = FORMS[name]
    form = load_object(line, f"data form {name!r}") if isinstance(line, str) else line
    if not callable(form):
        raise InputError(f"data form {name!r} is a {type(form).__name__}; allowed: a function of "
                         "an argument and a cache folder")
    folder = form(argument, cache_dir)
    if isinstance(folder, Folder):
        return folder
    if not isinstance(folder, str | Path) or not Path(folder).exists():
        raise InputError(f"data form {name!r} gives {folder!r:.100} for {data!r}; allowed: the "
                         "path of the folder that it has written")
    return Folder(Path(folder))
