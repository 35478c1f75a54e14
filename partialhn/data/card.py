"""The description of a data set's repository: the YAML at the top of its `README.md`.

It may say which files hold which split (`configs`), and the class names and numbers of images
(`dataset_info`). Somebody else wrote it, so its shape is checked.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from partialhn.data.columns import class_names
from partialhn.data.listing import SPLIT_WORDS, split_of_folder
from partialhn.errors import InputError

README = "README.md"
MAX_README = 16 * 1024 ** 2
"""Largest size in bytes of a README.md that is looked into."""


@dataclasses.dataclass(frozen=True)
class Card:
    """One configuration of a data set, as its README.md describes it."""

    path: str = ""
    """The README.md; empty where there is none."""
    folder: str = ""
    """Folder of the configuration below that of the README.md."""
    patterns: Mapping[str, tuple[str, ...]] | None = None
    """Patterns of files by the split's own name; None where names of files and folders say it."""
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Class names by column."""
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of images by the split's own name."""
    others: tuple[str, ...] = ()
    """Names of all configurations, where none was chosen and none is the default."""

    def require_choice(self) -> None:
        """Raises InputError where several configurations exist and none was chosen."""
        if self.others:
            folder = self.path.rpartition("/")[0]
            raise InputError(f"{self.path} has the configurations {', '.join(self.others)} and no "
                             f"default; allowed: data hf:{folder}:{self.others[0]}, or another of "
                             "them")


def read_card(filesystem: Any, root: str, listing: Sequence[str], chosen: str | None) -> Card:
    """What the README.md of a folder says about one configuration of the data set.

    chosen: its name; None: the only one, or the default. Raises: InputError for YAML of another
    shape, or an unknown configuration.
    """
    path = f"{root}/{README}"
    values = _front_matter(filesystem, path) if README in listing else {}
    configs = {str(config.get("config_name", "default")): config
               for config in _objects(values.get("configs"), f"configs of {path}")}
    infos = {str(info.get("config_name", "default")): info
             for info in _objects(values.get("dataset_info"), f"dataset_info of {path}")}
    known = list(configs) or list(infos)
    if chosen is not None and chosen not in known:
        raise InputError(f"configuration is {chosen!r}; allowed: one that the README.md of {root} "
                         f"has ({', '.join(known) or 'none'})")
    default = [name for name, config in configs.items() if config.get("default") is True]
    name = chosen or next(iter(default), known[0] if len(known) == 1 else "default")
    if known and name not in known:
        return Card(path, others=tuple(known))
    config, info = configs.get(name, {}), infos.get(name, {})
    return Card(path if values else "", _inside(config.get("data_dir"), path),
                _patterns(config.get("data_files"), path), _names(info, path), _rows(info, path))


def split_named(name: str) -> str | None:
    """The split of a split's own name, such as `test` or `validation`; None for another word."""
    return SPLIT_WORDS.get(name.lower()) or split_of_folder(name)


def matching(paths: Iterable[str], patterns: Sequence[str], folder: str = "") -> list[str]:
    """The paths that one of some glob patterns matches; `**` stands for any number of folders."""
    base = f"{folder}/" if folder else ""
    expressions = [_expression(base + pattern) for pattern in patterns]
    return sorted(path for path in paths if not path.endswith("/")
                  and any(expression.fullmatch(path) for expression in expressions))


def _expression(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob pattern. Raises: InputError for brackets out of order."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    try:
        return re.compile("".join(
            meaning.get(piece) or (piece.replace("[!", "[^") if piece[:1] == "[" and piece[1:]
                                   else re.escape(piece)) for piece in pieces))
    except re.error as error:
        raise InputError(f"pattern {pattern!r} of a README.md cannot be used: {error}") from error


def _front_matter(filesystem: Any, path: str) -> Mapping[str, Any]:
    """The YAML between the first two lines of three dashes; empty without them."""
    with filesystem.open_input_file(path) as source:
        if source.size() > MAX_README:
            return {}
        lines = bytes(source.readall()).decode("utf-8-sig", "replace").splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in lines[1:]:
        return {}
    try:
        values = yaml.safe_load("\n".join(lines[1:lines.index("---", 1)]))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"the YAML at the top of {path} cannot be read: {error}") from error
    return values if isinstance(values, Mapping) else {}


def _objects(value: Any, what: str) -> list[Mapping[str, Any]]:
    """One object or a list of them. Raises: InputError for anything else."""
    listed = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(one, Mapping) for one in listed):
        raise InputError(f"{what} are {value!r:.100}; allowed: a list of objects")
    return listed


def _patterns(value: Any, path: str) -> Mapping[str, tuple[str, ...]] | None:
    """Patterns by split: `data_files` is a pattern, a list of them, or a list of split and path."""
    if value is None:
        return None
    listed = value if isinstance(value, list) else [value]
    patterns: dict[str, tuple[str, ...]] = {}
    for one in listed:
        split, given = ((one.get("split"), one.get("path")) if isinstance(one, Mapping)
                        else ("train", one))
        paths = given if isinstance(given, list) else [given]
        if not isinstance(split, str) or not all(isinstance(text, str) for text in paths):
            raise InputError(f"data_files of {path} are {value!r:.100}; allowed: a pattern, a list "
                             "of patterns, or a list of objects with split and path")
        patterns[split] = patterns.get(split, ()) + tuple(_inside(text, path) for text in paths)
    return patterns


def _inside(value: Any, path: str) -> str:
    """A path or pattern below the folder. Raises: InputError for another place."""
    if value is None:
        return ""
    text = str(value).removeprefix("./").rstrip("/")
    if "://" in text or text.startswith("/") or ".." in text.split("/"):
        raise InputError(f"{path} names the files {value!r}; allowed: files below its own folder")
    return "" if text == "." else text


def _names(info: Mapping[str, Any], path: str) -> Mapping[str, tuple[str, ...]]:
    """Class names by column, of columns with the type class_label."""
    names = {}
    for feature in _objects(info.get("features"), f"features of {path}"):
        kind = feature.get("dtype")
        label = kind.get("class_label") if isinstance(kind, Mapping) else None
        if isinstance(label, Mapping):
            listed = class_names(label.get("names"), path)
            if listed is not None:
                names[str(feature.get("name"))] = listed
    return names


def _rows(info: Mapping[str, Any], path: str) -> Mapping[str, int]:
    """Numbers of images by split's own name, where the YAML says them."""
    splits = _objects(info.get("splits"), f"splits of {path}")
    return {str(split.get("name")): split["num_examples"] for split in splits
            if isinstance(split.get("num_examples"), int)}
