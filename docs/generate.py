"""The documentation's generated pages: command line, configuration and Python, from the code.

MkDocs runs this file as a hook (`mkdocs.yml`). `python docs/generate.py` prints the pages. An
option's text is the docstring under its field, which `--help` prints too.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from tyro.conf import Positional

import partialhn
from partialhn.config import Config
from partialhn.environment import VARIABLES
from partialhn.presets import PRESETS, preset
from pipelines.cli.main import COMMANDS
from pipelines.gate import Policy
from pipelines.retrain.validate import ArrivalPolicy
from pipelines.settings import Group

DOCS = Path(__file__).parent
SECTIONS = {field.name: field.default_factory for field in dataclasses.fields(Config)}
"""The configuration's classes by the name of their section."""
FOLDERS = {"Design decisions": "design", "Measurements": "measurements"}
"""Parts of the navigation whose pages are whatever lies in a folder."""
NUMBER_GAPS = re.compile(r"(?<=\d) (?=%|±|[kMG]i?B|s\b|times\b|points?\b)|(?<=±) (?=\d)")
"""Gaps between a number and its unit, or around its interval."""
FIRST = ("Stream", "TaskResult", "StreamMetrics", "run_stream", "RunResult")
"""Python names that a reader wants first; the others follow in the order of `__all__`."""
OPTIONAL = {"Guides": [{"Extend it": "how-to/extend.md"}],
            "Reference": [{"Compatibility": "compatibility.md"}, {"Upgrading": "upgrading.md"}]}


def on_config(config: Any) -> Any:
    """Adds the pages of `FOLDERS` and `OPTIONAL` that exist to the navigation."""
    for part in config.nav:
        for title, pages in OPTIONAL.items():
            if title in part:
                part[title] += [page for page in pages
                                if (DOCS / next(iter(page.values()))).exists()]
    for title, folder in FOLDERS.items():
        pages = sorted((DOCS / folder).glob("*.md"), key=lambda path: (path.stem != "README", path))
        if pages:
            config.nav.insert(-1, {title: [
                {"Overview": f"{folder}/{path.name}"} if path.stem == "README" else
                f"{folder}/{path.name}" for path in pages]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keeps a number with its unit on one line in the narrow columns of tables."""
    return "\n".join(NUMBER_GAPS.sub("\N{NO-BREAK SPACE}", line) if line.startswith("|") else line
                     for line in markdown.split("\n"))


def pages() -> dict[str, str]:
    """The text of each generated page by its path below docs/."""
    return {"reference/cli.md": cli_page(), "reference/configuration.md": configuration_page(),
            "reference/python.md": python_page()}


def cli_page() -> str:
    """Every command with its options."""
    lines = ["# Command line", "",
             "`partialhn COMMAND --help` prints the same text. Exit codes: 0 done, 1 failed, "
             "2 bad input; a command that has others says so.", "",
             "This page is generated from the code.", ""]
    for words, kind in commands():
        lines += [f"## partialhn {words}", "", inspect.getdoc(kind) or "", ""]
        fields = list(own_fields(kind))
        if fields:
            lines += option_table(kind, fields)
        for name, section in sections(kind).items():
            lines += [f"Options of the section [{name}](configuration.md#{name}): "
                      + ", ".join(f"`{option(field, section)}`{{.option}}"
                                  for field in dataclasses.fields(section)) + ".", ""]
    return "\n".join(lines)


def configuration_page() -> str:
    """Every configuration key, the presets, and the keys of the policy."""
    lines = ["# Configuration", "",
             "A configuration file is YAML with these sections; every key is optional, and an "
             "unknown key is an error. On the command line a key is an option without its "
             "section: `train.learning_rate` is `--learning-rate`. Options win over the file.", "",
             "```yaml", "# my-stream.yaml", yaml.safe_dump(EXAMPLE, sort_keys=False).strip(), "```",
             "", "This page is generated from the code.", ""]
    for name, section in SECTIONS.items():
        lines += [f"## {name}", "", inspect.getdoc(section) or "", "",
                  *option_table(section, dataclasses.fields(section), keys=True)]
    lines += ["## Presets", "", "`--preset NAME` starts from one of these. What differs from the "
              "defaults:", "", "| preset | values |", "|---|---|"]
    lines += [f"| `{name}` | {differences(preset(name))} |" for name in PRESETS]
    for title, kind, text in (
            ("Policy", Policy, "The file of `retrain --policy`. `null` does not ask."),
            ("Policy, section inbox", ArrivalPolicy, "Limits on what arrives.")):
        lines += ["", f"## {title}", "", inspect.getdoc(kind) or "", "", text, "",
                  *option_table(kind, dataclasses.fields(kind), keys=True)]
    lines += ["", "## Environment", "", "Variables of other libraries that touch an option. "
              "An explicit option wins; `partialhn doctor` shows the variables that are set.", "",
              "| variable | option | it |", "|---|---|---|"]
    lines += [f"| {', '.join(f'`{name}`' for name in variable.names)} | {variable.option} "
              f"| {variable.effect} |" for variable in VARIABLES]
    return "\n".join(lines)


EXAMPLE = {"data": {"data": "/data/products", "tasks": 12}, "backbone": {"freeze_depth": 3},
           "train": {"epochs": 15, "compare": ["separate_heads"]}}


def python_page() -> str:
    """Every public name of `partialhn`, drawn by mkdocstrings."""
    lines = ["# Python", "", "`import partialhn as phn` gives these names. The import itself loads "
             "neither torch nor pandas; a name loads what it needs when it is first used.", "",
             "This page is generated from the code.", ""]
    names = [name for name in partialhn.__all__ if not name.startswith("_")]
    for name in sorted(names, key=lambda name: name not in FIRST):
        lines += [f"::: partialhn.{name}", ""]
    return "\n".join(lines)


def commands(kinds: dict[str, Any] = COMMANDS, start: str = "") -> Iterator[tuple[str, Any]]:
    """The words and the class of every command; a group stands before its commands."""
    for word, kind in kinds.items():
        yield f"{start}{word}", kind
        if issubclass(kind, Group):
            yield from commands(kind.COMMANDS, f"{start}{word} ")


def sections(kind: Any) -> dict[str, Any]:
    """The configuration's sections that a command takes options of."""
    if not dataclasses.is_dataclass(kind):
        return {}
    return {field.name: SECTIONS[field.name] for field in dataclasses.fields(kind)
            if field.name in SECTIONS}


def own_fields(kind: Any) -> Iterator[tuple[Any, Any]]:
    """A command's (owner, field) pairs outside of the configuration's sections."""
    if not dataclasses.is_dataclass(kind):
        return
    for field in dataclasses.fields(kind):
        if field.name in SECTIONS:
            continue
        inner = hints(kind)[field.name]
        if dataclasses.is_dataclass(inner):
            yield from own_fields(inner)
        else:
            yield kind, field


def option_table(kind: Any, fields: Any, keys: bool = False) -> list[str]:
    """A table of options, or of a file's keys with their options."""
    lines = [f"| {'key' if keys else 'option'} | value | default | meaning |", "|---|---|---|---|"]
    for item in fields:
        owner, field = item if isinstance(item, tuple) else (kind, item)
        name = field.name if keys else option(field, owner)
        cells = (f"`{name}`", cell(value_text(hints(owner)[field.name])), default_text(field),
                 cell(docs_of(owner).get(field.name, "")))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def option(field: Any, owner: Any) -> str:
    """A field as an option of the command line."""
    words = field.name.replace("_", "-")
    if is_positional(field.name, owner):
        return words.upper()
    names = [f"--{words}", *aliases(field.name, owner)]
    return ", ".join(names + [f"--no-{words}"] * (hints(owner)[field.name] is bool))


def aliases(name: str, owner: Any) -> Iterator[str]:
    """Other names of an option, from its annotation."""
    annotated = typing.get_type_hints(owner, include_extras=True)[name]
    for extra in getattr(annotated, "__metadata__", ()):
        yield from getattr(extra, "aliases", None) or ()


def is_positional(name: str, owner: Any) -> bool:
    annotated = typing.get_type_hints(owner, include_extras=True)[name]
    return annotated == Positional[typing.get_args(annotated)[0]] if typing.get_args(
        annotated) and hasattr(annotated, "__metadata__") else False


def hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def value_text(kind: Any) -> str:
    """A type in words: int, one of several words, a list."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    words = getattr(kind, "table", arguments if origin is Literal else ())
    if words:
        return ", ".join(f"`{value}`" for value in words)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(value_text(each) for each in arguments if each is not type(None))
    if origin is tuple:
        return "list of " + value_text(arguments[0])
    return {bool: "true, false", int: "whole number", float: "number", str: "text"}.get(
        kind, getattr(kind, "__name__", str(kind)))


def default_text(field: Any) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "see there"
    if field.default is None or field.default == () or field.default == "":
        return "none"
    value = field.default
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{' '.join(map(str, value)) if isinstance(value, tuple) else value}`"


def docs_of(kind: Any) -> dict[str, str]:
    """The docstring under each field of a class and of its bases."""
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        for item, following in itertools.pairwise(body):
            if (isinstance(item, ast.AnnAssign) and isinstance(following, ast.Expr)
                    and isinstance(following.value, ast.Constant)):
                texts[item.target.id] = inspect.cleandoc(str(following.value.value))
    return texts


def differences(config: Config) -> str:
    """The values in which a configuration differs from the defaults."""
    plain, given = Config().to_dict(), config.to_dict()
    return ", ".join(f"`{key}: {value}`" for section, values in given.items()
                     for key, value in values.items() if value != plain[section][key])


def cell(text: str) -> str:
    """One line, safe in a table and in Markdown."""
    return " ".join(text.split()).replace("|", r"\|").replace("<", "&lt;").replace("*", r"\*")


if __name__ == "__main__":
    for path, text in pages().items():
        print(f"<!-- {path} -->\n{text}")
