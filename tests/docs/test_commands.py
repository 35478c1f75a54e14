"""Every command of the documents is a real one, with options that parse."""

import contextlib
import dataclasses
import io
import re
import shlex
import subprocess

import pytest
import yaml

from partialhn.config import Config, load_config
from partialhn.presets import PRESETS
from pipelines.cli.main import COMMANDS, _parse
from pipelines.demo import demo_config
from pipelines.gate import Policy, load_policy
from pipelines.search.space import load_space
from pipelines.settings import Group
from tests.docs.pages import PAGES, ROOT, blocks_of, shell_lines

TOOLS = {".venv/bin/partialhn": "partialhn", "partialhn": "partialhn", "make": "make",
         ".venv/bin/python": "python", "python": "python"}
ELSEWHERE = {"--help", "--version", "--config", "--preset", "--env-manager", "--from-literal"}
"""Options that are no field of a configuration class."""
NOT_RUN = 0
"""Blocks with a comment that says why they are not run. Count them here, so that none slips in."""
COMMAND_LINES = list(dict.fromkeys(line for block in blocks_of("console", "bash", "sh")
                                   if block.reason is None for line in shell_lines(block)))
CONFIGURATION = "data: {data: digits, tasks: 5}\n"


def test_pages_have_commands_of_every_tool_and_of_the_main_commands():
    tools = {shlex.split(line)[0] for line in COMMAND_LINES}
    assert tools <= set(TOOLS), "teach this test the new one"
    shown = {shlex.split(line)[1] for line in COMMAND_LINES if "partialhn " in line}
    assert shown >= {"train", "predict", "report", "show", "tune", "retrain", "models", "serve",
                     "drift", "features", "reproduce", "doctor"}


def test_blocks_that_are_not_run_are_counted():
    reasons = [block.reason for block in blocks_of("console", "bash", "sh", "python", "yaml")
               if block.reason]
    assert len(reasons) == NOT_RUN, reasons


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_a_command_of_the_documents_parses(line, tmp_path, monkeypatch):
    tool, *words = shlex.split(line)
    if TOOLS[tool] == "make":
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif TOOLS[tool] == "python":
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        assert all(word in source for word in words[1:] if word.startswith("--"))
    else:
        (tmp_path / "advice").mkdir()
        for name in ("my-stream.yaml", "advice/depth-3.yaml"):
            (tmp_path / name).write_text(CONFIGURATION)
        monkeypatch.chdir(tmp_path)
        if words == ["--version"]:
            return
        if words[-1] == "--help":
            with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
                _parse(words)
            assert end.value.code == 0
        else:
            assert isinstance(_parse(words), tuple(kinds()))


YAML_BLOCKS = blocks_of("yaml")


@pytest.mark.parametrize("block", YAML_BLOCKS, ids=lambda block: block.page)
def test_a_configuration_file_of_the_documents_is_valid(block, tmp_path):
    """Its first line names the file, and so the reader that must take it."""
    path = tmp_path / "file.yaml"
    path.write_text(block.body)
    name = block.body.splitlines()[0].removeprefix("# ").split(":")[0]
    if name == "policy.yaml":
        assert load_policy(path) != Policy()
    elif name == "space.yaml":
        assert load_space(str(path), Config(), [2, 3, 4]).depths()
    elif name == "crontab.yaml":
        assert yaml.safe_load(block.body)
    else:
        assert name == "my-stream.yaml", "name the file in the first line"
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
    benches = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    others = ELSEWHERE | set(re.findall(r"add_argument\(\"(--[a-z][a-z-]*)", benches))
    for page, text in PAGES.items():
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M)
        prose = re.sub(
            r"`(?:\.venv/bin/)?(python|mlflow|docker|kubectl|pytest|mkdocs|hf) [^`]*`", "", prose)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", prose))
        assert named <= options | (others if page.startswith("docs/") else ELSEWHERE), page


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
