"""The table of data forms that the option `data` names, as digits or torchvision:NAME.

A form is a function `(argument, cache_dir) -> folder`: it takes what stands after the colon, writes
the data set once below `cache_dir`, and returns a folder that `partialhn.data.layout` reads, for
example Parquet files from `partialhn.data.library.write_parquet`. Other packages add lines with
`register_data_form` or with an entry point of the group `partialhn.data`. Everything that the table
does not name is the path of a data set.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

from partialhn.errors import InputError
from partialhn.plugins import Table, load_object

FORMS: Table[object] = Table("data", "partialhn.data", {
    "digits": "partialhn.data.library:digits_form",
    "torchvision": "partialhn.data.library:convert_torchvision",
}, lambda _name, value: value)


def register_data_form(name: str, source: str | Callable[[str, Path], Path]) -> None:
    """Makes a data form known in this process: `data` may then be NAME or NAME:ARGUMENT.

    Args:
        name: the word before the colon.
        source: the function, or where it is, as module:function.

    Raises: InputError for a name that is taken.
    """
    FORMS.register(name, source)


def converted_folder(data: str, cache_dir: Path) -> Path | None:
    """The folder that a form of the table writes for `data`; None where `data` is a path.

    Raises: InputError for a form that cannot be imported, or an argument that it refuses.
    """
    name, _, argument = data.partition(":")
    if argument.startswith("//") or name not in FORMS:
        return None
    line = FORMS[name]
    form = load_object(line, f"data form {name!r}") if isinstance(line, str) else line
    if not callable(form):
        raise InputError(f"data form {name!r} is a {type(form).__name__}; allowed: a function of "
                         "an argument and a cache folder")
    return cast(Path, form(argument, cache_dir))
