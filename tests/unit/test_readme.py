"""Every command of the README and ARCHITECTURE is a real one, with options that parse."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from partialhn.config import Config, load_config
from partialhn.presets import PRESETS
from pipelines.cli.main import COMMANDS, _parse
from pipelines.demo import demo_config
from pipelines.retrain.gate import Policy, load_policy
from pipelines.search.space import load_space
from pipelines.settings import Group

ROOT = Path(__file__).parents[2]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md",
                                                                     "ARCHITECTURE.md")}
TOOLS = {".venv/bin/partialhn": "partialhn", "partialhn": "partialhn", "make": "make"}
ELSEWHERE = {"--help", "--version", "--config", "--preset", "--env-manager"}
"""Options that are no field of a configuration class."""


def blocks(text: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [body for language, body in found if language in languages]


def commands() -> list[str]:
    """Every line of every console block, without its prompt, continued lines joined."""
    lines = [line.removeprefix("$ ").split("  #")[0].strip()
             for text in TEXTS.values() for block in blocks(text, "console", "bash", "sh")
             for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


CONFIGURATION = next(text for text in blocks(TEXTS["README.md"], "yaml")
                     if not text.startswith("#"))


def test_there_are_commands():
    tools = {shlex.split(line)[0] for line in commands()}
    assert tools == {".venv/bin/partialhn", "make"}, "teach this test the new one"
    shown = {shlex.split(line)[1] for line in commands() if "partialhn " in line}
    assert shown >= {"train", "predict", "report", "show", "tune", "retrain", "models", "serve"}


@pytest.mark.parametrize("line", commands())
def test_a_command_of_the_readme_parses(line, tmp_path, monkeypatch):
    tool, *words = shlex.split(line)
    if TOOLS[tool] == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    (tmp_path / "advice").mkdir()
    for name in ("my-stream.yaml", "advice/depth-3.yaml"):
        (tmp_path / name).write_text(CONFIGURATION)
    monkeypatch.chdir(tmp_path)
    assert isinstance(_parse(words), tuple(kinds()))


def test_configuration_files_of_the_readme_are_valid(tmp_path):
    found = blocks(TEXTS["README.md"], "yaml")
    assert found
    for number, text in enumerate(found):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        if text.startswith("# policy.yaml"):
            assert load_policy(path) != Policy()
        elif text.startswith("# space.yaml"):
            assert load_space(str(path), Config(), [2, 3, 4]).depths() == [2, 3, 4]
        else:
            assert load_config(path) != Config()


def kinds(commands=COMMANDS):
    """The classes of all commands, those in groups too."""
    for kind in commands.values():
        yield from kinds(kind.COMMANDS) if issubclass(kind, Group) else [kind]


def test_every_option_that_is_named_exists():
    fields = [field for kind in kinds()
              for part in [kind, *(f.type for f in dataclasses.fields(kind))]
              if dataclasses.is_dataclass(part) for field in dataclasses.fields(part)]
    options = {f"--{start}{field.name.replace('_', '-')}" for field in fields
               for start in (["", "no-"] if field.type is bool else [""])}
    for name, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", prose))
        assert named <= options | ELSEWHERE, name


def test_presets_give_their_command():
    source = (ROOT / "partialhn" / "presets.py").read_text(encoding="utf-8")
    given = [shlex.split(line) for line in re.findall(r"^ *# (partialhn .*)$", source, re.M)]
    assert [words[words.index("--preset") + 1] for words in given] == list(PRESETS)
    for _, *words in given:
        command = _parse(words)
        config = PRESETS[words[words.index("--preset") + 1]]
        assert dataclasses.replace(command.data, data=config.data.data) == config.data
        assert command.train == config.train
        assert command.hypernet == config.hypernet


def test_the_small_demo_is_the_demo_with_fewer_passes():
    small, full = demo_config("small"), demo_config("full")
    assert small.data == full.data
    assert small.hypernet == full.hypernet
    assert small.train.epochs < full.train.epochs
