"""Long commands end with what may be run next, and each of these commands is a real one."""

import shlex

import pytest

from partialhn.benchmarks.catalogue import BENCHMARKS
from pipelines.cli.main import _parse, next_commands
from pipelines.cli.next_steps import next_steps
from pipelines.cli.reproduce import Reproduce
from pipelines.cli.tune import next_commands as after_tune
from pipelines.search.settings import SearchConfig
from pipelines.settings import OutputConfig

CONFIGURATION = "data: {data: digits, tasks: 5}\n"


def commands(lines):
    assert lines[0] == "next:"
    return [shlex.split(line) for line in lines[1:] if not line.startswith("  (")]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_commands_after_a_benchmark(name):
    found = commands(Reproduce(name, "my data")._next())
    assert [words[1] for words in found] == ["reproduce", "train", "tune"]
    assert found[0][-2:] == ["--size", "cpu"]
    for words in found:
        assert words[words.index("--data") + 1] == "my data"
        _parse(words[1:])
    assert len(commands(Reproduce(name, "x", size="full")._next())) == 2


def test_commands_after_a_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "the advice").mkdir()
    (tmp_path / "the advice" / "depth-3.yaml").write_text(CONFIGURATION)
    search = SearchConfig(name="s", output="the advice", storage="s3://b/p",
                          tracking_uri="http://me:secret@host")
    found = commands(after_tune({"recommendation": {"config_file": "depth-3.yaml"}}, search))
    for words in found:
        _parse(words[1:])
        assert words[-4:] == ["--storage", "s3://b/p", "--tracking-uri", "http://me:***@host"]
    assert [words[1] for words in found] == ["train", "tune"]
    assert "without --forecast-only" in after_tune({"forecast": []}, search)[0]


def test_commands_after_training():
    result = {"tasks": [{"name": "cats", "classes": ["lion", "puma"]}],
              "model_uri": "models:/s@champion"}
    found = commands(next_commands(OutputConfig(name="s"), result))
    for words in found:
        _parse(words[1:])
    assert [words[1] for words in found] == ["report", "show", "predict"]


def test_the_default_storage_is_left_out():
    assert next_steps(["show"]) == ["next:", "  partialhn show"]
