"""Progress lines of a run that is not on a terminal."""

import pytest

from partialhn.config import Config
from partialhn.training.records import EpochRecord
from pipelines.platform.progress import Progress


@pytest.mark.parametrize(("show", "left"), [
    (lambda progress, epoch: progress.trunk(epoch), "about 8.0 s left of the trunk"),
    (lambda progress, epoch: progress.record("partial_hn", epoch), "about 8.0 s left of the task")])
def test_the_time_left_names_what_it_is_left_of(show, left):
    lines = []
    epoch = EpochRecord("a", 0, 1, 5, 0.5, 0.5, 0.0, 0.9, None, seconds=2.0)
    show(Progress(Config(), lines.append), epoch)
    assert len(lines) == 1
    assert lines[0].endswith(left)


def test_an_epoch_that_waited_does_not_change_the_time_left(monkeypatch):
    monkeypatch.setattr("pipelines.platform.progress.QUIET_SECONDS", -1.0)
    lines = []
    progress = Progress(Config(), lines.append)
    for number, seconds in enumerate([2.0, 2.0, 60.0, 2.0], 1):
        progress.trunk(EpochRecord("a", 0, number, 8, 0.5, 0.5, 0.0, 0.9, None, seconds=seconds))
    assert lines[-1].endswith("about 8.0 s left of the trunk")
