"""The state of a training is written beside its steps, at most every few seconds."""

import threading

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from partialhn.checkpoints import checkpoint
from partialhn.checkpoints.keeper import StateKeeper


def kept(folder):
    return checkpoint.load(folder, "some state")[1]["epoch"] if folder.exists() else None


def offered(target, seconds, count=3, stop=None):
    """A training whose only weight is the number of its epochs."""
    weight_1 = torch.zeros(1)
    with StateKeeper(LocalFileSystem(), str(target), "some state", seconds) as keeper:
        for epoch in range(1, count + 1):
            weight_1 += 1
            keeper.offer({"weight": weight_1}, {"epoch": epoch})
            yield epoch


def test_a_short_training_writes_nothing(tmp_path):
    list(offered(tmp_path / "state", seconds=3600))
    assert kept(tmp_path / "state") is None


def test_where_the_caller_stops_the_last_epoch_is_kept(tmp_path):
    for epoch in offered(tmp_path / "state", seconds=3600):
        if epoch == 2:
            break
    assert kept(tmp_path / "state") == 2


def test_a_state_is_the_one_that_was_offered(tmp_path, monkeypatch):
    """The training goes on while it is written."""
    go_on, save = threading.Event(), checkpoint.save

    def waits(*arguments):
        assert go_on.wait(60)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", waits)
    for epoch in offered(tmp_path / "state", seconds=0):
        if epoch == 3:
            go_on.set()
    tensors, fields = checkpoint.load(tmp_path / "state", "some state")
    assert (fields["epoch"], tensors["weight"].item()) == (1, 1)


def test_an_error_of_the_thread_ends_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        list(offered(tmp_path / "file" / "state", seconds=0))
