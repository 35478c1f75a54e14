"""The append-only history: numbers without gaps whoever writes, tokens, and going back."""

import json
import multiprocessing
from pathlib import Path

import pytest

from partialhn.errors import InputError, IntegrityError
from pipelines.platform.storage import open_storage
from pipelines.registry.history import History, Move, StaleTokenError, aliases, previous


@pytest.fixture
def history(tmp_path):
    return History(open_storage(str(tmp_path)), "demo")


def champion(to, kind="trained", **more):
    return Move("champion", to, kind, f"to {to}", **more)


def test_an_entry_says_everything(history, tmp_path):
    history.append(champion(1), "r")
    history.append(champion(2, metrics={"acc": 0.5}, token=7, decision={"passed": True}), "r")
    fields = json.loads((tmp_path / "history/demo/00000002.json").read_text())
    assert fields.pop("time").endswith("Z")
    assert "@" in fields.pop("who")
    assert fields == {"seq": 2, "kind": "trained", "alias": "champion", "from": 1, "to": 2,
                      "why": "to 2", "token": 7, "metrics": {"acc": 0.5},
                      "decision": {"passed": True}, "registry": "r"}
    again = History(open_storage(str(tmp_path)), "demo").entries()
    assert again == history.entries()
    assert aliases(again) == {"champion": 2}


def test_nothing_is_written_where_nothing_moves(history):
    assert history.append(champion(1), "r") is not None
    assert history.append(champion(1, "promoted"), "r") is None
    assert len(history.entries()) == 1


@pytest.mark.parametrize(("moves", "before"), [
    ([], None), ([1], None), ([1, 2, 3], 2), ([1, 2, 3, -2], 1), ([1, 2, 3, -1], None),
    ([1, 2, 3, -2, 4], 2), ([1, 2, 1], 2), ([1, 2, 3, -2, -1, 5], 1)])
def test_the_version_to_go_back_to(history, moves, before):
    """A negative number is a rollback to that version."""
    for number in moves:
        history.append(champion(abs(number), "rollback" if number < 0 else "trained"), "r")
    assert previous(history.entries(), "champion") == before


def test_other_aliases_are_not_mixed_up(history):
    for alias, to in (("task-a", 1), ("champion", 1), ("challenger", 9), ("champion", 2)):
        history.append(Move(alias, to, "trained", ""), "r")
    assert previous(history.entries(), "champion") == 1
    history.append(Move("challenger", None, "reconcile", "gone"), "r")
    assert aliases(history.entries()) == {"task-a": 1, "champion": 2, "challenger": None}


def test_a_lost_lease_cannot_write(history):
    history.append(champion(1, token=3), "r")
    history.append(champion(2), "r")
    with pytest.raises(StaleTokenError, match=r"taken over .* number 3, ours was 2"):
        history.append(champion(3, token=2), "r")
    assert history.append(champion(3, token=3), "r").seq == 3
    assert history.append(champion(4, token=4), "r").seq == 4


def _writer(root, barrier, number):
    history = History(open_storage(root), "demo")
    barrier.wait()
    for step in range(10):
        history.append(champion(100 * number + step), "r")


def test_racing_writers_leave_no_gap_and_overwrite_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_writer, args=(str(tmp_path), barrier, n)) for n in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    entries = History(open_storage(str(tmp_path)), "demo").entries()
    assert [entry.seq for entry in entries] == list(range(1, 31))
    assert sorted(entry.move.to for entry in entries) == [100 * n + s for n in (1, 2, 3)
                                                          for s in range(10)]
    held = [None, *(entry.move.to for entry in entries)]
    assert [entry.origin for entry in entries] == held[:-1], "each says what was before it"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000,
                                     b'{"seq": 1}', b'{"seq": true}', b"NaN", b'"a"'])
def test_damaged_entries_are_named(history, tmp_path, content):
    history.append(champion(1), "r")
    (tmp_path / "history/demo/00000001.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"demo/00000001.json cannot be read"):
        History(open_storage(str(tmp_path)), "demo").entries()


def test_missing_and_renumbered_entries_are_named(history, tmp_path):
    for number in (1, 2, 3):
        history.append(champion(number), "r")
    folder = tmp_path / "history" / "demo"
    (folder / "notes.txt").write_text("not an entry")
    (folder / "00000002.json").rename(folder / "00000004.json")
    with pytest.raises(IntegrityError, match=r"00000002.json is missing"):
        History(open_storage(str(tmp_path)), "demo").entries()
    (folder / "00000002.json").write_text((folder / "00000003.json").read_text())
    with pytest.raises(IntegrityError, match="holds seq 3; expected"):
        History(open_storage(str(tmp_path)), "demo").entries()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc", "a%2fb", "a\0b", "", "a" * 300])
def test_a_stream_cannot_leave_its_folder(tmp_path, name):
    with pytest.raises(InputError, match="name is"):
        History(open_storage(str(tmp_path)), name)
    assert not list(Path(tmp_path).iterdir())
