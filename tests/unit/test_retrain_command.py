"""What the command `retrain` prints of passes that an error ends, and when it goes on watching."""

import json

import pytest

from partialhn.errors import InputError
from pipelines.cli import retrain as command
from pipelines.cli.main import run
from pipelines.retrain import run as passes

REJECTED = {"task": "pets", "reasons": ["too few"], "codes": ["few"]}


@pytest.fixture
def each_pass(monkeypatch):
    """Lets every pass reject a task; then one after the other raises its error, if it has one."""
    def begin(*errors):
        waiting = list(errors)

        def retrain(settings, log, outcome):
            outcome.rejected.append(REJECTED)
            if error := waiting.pop(0):
                raise error
            return outcome

        monkeypatch.setattr(passes, "retrain", retrain)
        monkeypatch.setattr(command.time, "sleep", lambda _: None)
        return waiting
    return begin


def test_what_a_pass_did_is_printed_before_the_error_that_ends_it(each_pass, capsys):
    each_pass(InputError("the bucket is gone"), OSError("unplugged"))
    assert run(["retrain", "--name", "s"]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("rejected pets: too few\n", "error: the bucket is gone\n")
    assert run(["retrain", "--name", "s", "--json"]) == 1
    [line] = capsys.readouterr().out.splitlines()
    fields = json.loads(line)
    assert (fields["error"], fields["exit_code"]) == ("unplugged", 1)
    assert (fields["rejected"], fields["nothing_to_do"]) == ([REJECTED], False)


def test_an_error_of_the_first_pass_ends_the_watch_and_a_later_one_does_not(each_pass, capsys):
    words = ["retrain", "--name", "s", "--watch", "--json"]
    left = each_pass(InputError("--policy does not exist"), None)
    assert (run(words), left) == (2, [None])
    capsys.readouterr()
    left = each_pass(None, InputError("the server is away"), OSError("unplugged"), None,
                     KeyboardInterrupt())
    assert (run(words), left) == (1, [])
    told = capsys.readouterr()
    assert [json.loads(line)["error"] for line in told.out.splitlines()] == [
        "", "the server is away", "unplugged", ""]
    assert "error: the server is away" in told.err
    assert "OSError: unplugged" in told.err
