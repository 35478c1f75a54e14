"""The table of a stream's tasks that `partialhn show` prints."""

import pytest

from pipelines.registry.versions import Version
from pipelines.show import _tasks


def version(number, task, index):
    tags = {"task": task, "task_index": str(index), "classes": '["x", "y"]', "acc": "0.5",
            "learning_accuracy": "0.5", "forgetting": "0.0"}
    return Version("demo", number, "run", (), tags)


@pytest.mark.parametrize(("versions", "slots", "rows", "deleted"), [
    ([version(1, "a", 0), version(2, "b", 1)], ["a", "b"], ["0 a 1", "1 b 2"], None),
    # task a was forgotten: b and c stay, and the champion knows them as 0 and 1
    ([version(2, "b", 1), version(4, "c", 1)], ["b", "c"], ["0 b 2", "1 c 4"], None),
    ([version(3, "c", 2)], ["a", "b", "c"], ["2 c 3"], "2 more of the champion's tasks are not"),
    # refreshed: task a, which keeps its number, and b after the versions before it were deleted
    ([version(1, "a", 0), version(2, "b", 1), version(3, "a", 2), version(4, "c", 3)],
     ["a", "b", "a", "c"], ["0 a 3", "1 b 2", "2 c 4"], None),
    ([version(3, "c", 2), version(4, "b", 3)], ["a", "b", "c", "b/2"], ["1 b 4", "2 c 3"],
     "1 more of the champion's tasks are not"),
    ([version(3, "c", 2)], None, ["c x, 3"], "2 more of the champion's tasks are not"),
])
def test_a_task_has_the_number_that_predict_takes_and_deleted_versions_are_said(
        versions, slots, rows, deleted):
    lines = _tasks(versions, slots)
    found = [line.split() for line in lines[1:1 + len(rows)]]
    if slots is None:
        assert [words[0] for words in found] == ["c"]
        assert any("no numbers here" in line for line in lines)
    else:
        assert [f"{words[0]} {words[1]} {words[4]}" for words in found] == rows
    assert lines[1 + len(rows)].startswith("accuracy, when learned, forgotten: means")
    assert (deleted is None) == all("not listed" not in line for line in lines)
    assert deleted is None or any(line.startswith(deleted) for line in lines)
