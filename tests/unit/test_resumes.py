"""What a command says when it fails or is interrupted: that it resumes, if it does."""

import pytest

from pipelines.cli import main

FAILED = "failed: the same command resumes after the last finished step"
INTERRUPTED = "interrupted: the same command resumes from here"


@pytest.mark.parametrize(("words", "resumes"), [
    (["train"], True), (["retrain"], True), (["tune"], True), (["reproduce"], True),
    (["show"], False), (["serve"], False), (["predict"], False), (["models", "list"], False),
    (["report"], False), (["export"], False), (["doctor"], False), (["demo"], False)])
def test_only_a_command_that_goes_on_where_it_stopped_says_so(words, resumes, monkeypatch, capsys):
    assert words[0] in main.COMMANDS

    def stopped_by(error):
        def stop(_):
            raise error
        return stop

    for error, said in ((RuntimeError("a bug"), FAILED), (KeyboardInterrupt(), INTERRUPTED)):
        monkeypatch.setattr(main, "_run", stopped_by(error))
        assert main.run(words) == 1
        lines = capsys.readouterr().err.splitlines()
        assert (said in lines) == resumes
        assert any("the same command" in line for line in lines) == resumes


def test_every_command_that_resumes_exists():
    assert set(main.RESUMING) <= set(main.COMMANDS)
