"""Progress lines of a run that is not on a terminal."""

import pytest

from partialhn.config import Config
from partialhn.training.records import EpochRecord
from pipelines.platform.progress import Progress


@pytest.mark.parametrize(("show", "left"), [
    (lambda progress, epoch: progress.trunk(epoch), "about 8 s left of the trunk"),
    (lambda progress, epoch: progress.record("partial_hn", epoch), "about 8 s left of the task")])
def test_the_time_left_names_what_it_is_left_of(show, left):
    lines = []
    epoch = EpochRecord("a", 0, 1, 5, 0.5, 0.5, 0.0, 0.9, None, seconds=2.0)
    show(Progress(Config(), lines.append), epoch)
    assert len(lines) == 1
    assert lines[0].endswith(left)
