"""The table of a stream's tasks that `partialhn show` prints."""

import pytest

from pipelines.registry.versions import Version
from pipelines.show import _tasks


def version(number, task, index):
    tags = {"task": task, "task_index": str(index), "classes": '["x", "y"]', "acc": "0.5",
            "learning_accuracy": "0.5", "forgetting": "0.0"}
    return Version("demo", number, "run", (), tags)


@pytest.mark.parametrize(("versions", "numbers", "deleted"), [
    ([version(1, "a", 0), version(2, "b", 1)], ["0", "1"], None),
    # task a was forgotten: b and c stay, and the champion knows them as 0 and 1
    ([version(2, "b", 1), version(4, "c", 1)], ["0", "1"], None),
    ([version(3, "c", 2)], ["2"], "2 more of the champion's tasks are not listed"),
])
def test_tasks_have_the_champions_numbers_and_deleted_versions_are_said(versions, numbers,
                                                                       deleted):
    lines = _tasks(versions)
    assert [line.split()[0] for line in lines if line[0].isdigit()][:len(numbers)] == numbers
    assert any(line.startswith("accuracy, when learned, forgotten: means") for line in lines)
    assert (deleted is None) == all("not listed" not in line for line in lines)
    assert deleted is None or any(line.startswith(deleted) for line in lines)
