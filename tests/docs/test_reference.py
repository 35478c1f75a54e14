"""The generated reference holds every command, option and key, and the site builds offline."""

import contextlib
import dataclasses
import importlib.util
import io
import re

import pytest

from partialhn.config import Config
from partialhn.presets import PRESETS
from pipelines.cli.main import COMMANDS, _parse
from pipelines.gate import Policy
from pipelines.retrain.validate import ArrivalPolicy
from pipelines.settings import Group
from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(generate):
    return generate.pages()


def all_commands(kinds=COMMANDS, start=()):
    for word, kind in kinds.items():
        if issubclass(kind, Group):
            yield from all_commands(kind.COMMANDS, (*start, word))
        else:
            yield (*start, word)


@pytest.mark.parametrize("words", list(all_commands()), ids=" ".join)
def test_every_option_of_help_stands_in_the_reference(words, pages):
    """`--help` is drawn by the parser itself, so it knows options that no list has."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        _parse([*words, "--help"])
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", out.getvalue())) - {"--help"}
    page = pages["reference/cli.md"]
    part = page[page.index(f"## partialhn {' '.join(words)}\n"):].split("\n## ")[0]
    assert options
    missing = options - set(re.findall(r"--[a-z][a-z0-9-]*", part))
    assert not missing


def test_every_configuration_key_has_a_row_with_its_text(pages):
    page = pages["reference/configuration.md"]
    kinds = {field.name: field.default_factory for field in dataclasses.fields(Config)}
    kinds |= {"Policy": Policy, "Policy, section inbox": ArrivalPolicy}
    for title, kind in kinds.items():
        part = page[page.index(f"\n## {title}\n"):].split("\n## ")[1]
        for field in dataclasses.fields(kind):
            row = re.search(rf"^\| `{field.name}` \| (.+) \| (.+) \| (.+) \|$", part, re.M)
            assert row, (title, field.name)
            assert len(row[3]) > 5, f"{title}.{field.name} has no docstring"
    for name in PRESETS:
        assert f"| `{name}` |" in page


def test_every_command_line_option_has_a_text(generate):
    for words, kind in generate.commands():
        for owner, field in generate.own_fields(kind):
            assert generate.docs_of(owner).get(field.name), (words, field.name)
