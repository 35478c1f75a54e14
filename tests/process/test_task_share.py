"""Workers that share independent tasks: the bits of one worker, killed or not, and one reason."""

import dataclasses
import json
import pickle
import signal
import uuid
from pathlib import Path

import pytest
import torch

from partialhn.checkpoints.model import Model
from partialhn.errors import DivergedError, InputError
from partialhn.features.extract import feature_jobs
from partialhn.networks.trunk import outputs_at
from partialhn.run import cut_network, with_strategy
from partialhn.training import lineage
from partialhn.training.learner import Learner
from partialhn.training.lineage import lineage_ids_of
from partialhn.training.records import TaskRecord
from partialhn.training.result import Outcome
from partialhn.training.slots import open_task_features, slots_of
from pipelines.execution.choose import open_execution
from pipelines.execution.open_data import open_data
from pipelines.execution.task_share import WorkerRank, error_fields, error_of
from pipelines.execution.worker import Assignment
from pipelines.features.produce import open_store
from pipelines.platform.progress import Progress
from pipelines.platform.storage import open_storage
from tests.process.share_worker import share
from tests.processes import Ended, Forked
from tests.support import small_config

CONFIG = small_config(data={"tasks": 5, "images_per_class": 60}, backbone={"trunk_epochs": 1},
                      hypernet={"dictionary": 3, "dictionary_after": 3},
                      train={"batch_size": 32})
"""The last of five tasks uses the dictionary that the second to the fourth have left."""


@dataclasses.dataclass
class Ready:
    """Features that are there, and what one worker made of them."""

    assignment: Assignment
    root: Path
    weights: str

    def at_once(self, count: int, **train) -> Assignment:
        """The same to learn, by one worker that learns some tasks at once."""
        config = self.assignment.config
        return self.anew(config=dataclasses.replace(
            config, compute=dataclasses.replace(config.compute, workers=1, tasks_at_once=count),
            train=dataclasses.replace(config.train, **train)))

    def alone(self, assignment: Assignment, *end) -> Ended:
        return Forked(share, assignment, 0, 1, *end, cwd=self.root).wait(200)

    def run(self, assignment: Assignment, *ends: tuple) -> list[Ended]:
        """Two workers; `ends` says after which record which of them is killed."""
        started = [Forked(share, assignment, rank, 2, *(ends[rank] if ends else ()), cwd=self.root)
                   for rank in range(2)]
        if not ends:
            return [process.wait(200) for process in started]
        first = 1 if ends[1] else 0
        killed = started[first].wait(200)
        started[1 - first].kill()  # what a worker group does: one is dead, and so all are
        other = started[1 - first].wait()
        return [other, killed] if first else [killed, other]

    def hash_of(self, assignment: Assignment) -> str:
        return learned_hash(assignment, self.root / uuid.uuid4().hex)

    def anew(self, **changes) -> Assignment:
        """The same to learn, in a folder of models of its own."""
        folder = self.assignment.storage.path("runs", uuid.uuid4().hex)
        return dataclasses.replace(self.assignment, folder=f"{folder}/learned", run=f"{folder}/run",
                                   attempt=uuid.uuid4().hex, **changes)


def learned_hash(assignment: Assignment, scratch: Path) -> str:
    lineage.fetch_model(assignment.storage.filesystem, assignment.folder,
                        assignment.lineage_ids[-1],
                      scratch)
    return Model.load(scratch).weights_hash()


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    root = tmp_path_factory.mktemp("share")
    storage = open_storage(str(root / "store"))
    experiences = open_data(CONFIG.data, storage)
    stages = open_execution(CONFIG, storage, "alone", Progress(CONFIG, lambda _: None))
    with stages:
        cut = cut_network(CONFIG, stages.network(experiences[0]))
        jobs = feature_jobs(CONFIG, experiences, cut.trunk)
        slots = slots_of(experiences, jobs, stages.features(jobs, cut)[0])
        slots[4] = dataclasses.replace(slots[1], name=f"{slots[1].name}/2")
        lineage_ids = lineage_ids_of(CONFIG, cut.network, slots)
        stages.learn(cut, slots, lineage_ids, lambda *_: None)
        shared = dataclasses.replace(CONFIG, compute=dataclasses.replace(CONFIG.compute,
                                                                         workers=2))
        alone = Assignment(shared, cut, tuple(slots), lineage_ids, storage, stages.folder,
                           storage.path("runs", "alone", "run"), 1)
    return Ready(alone, root, learned_hash(alone, root / "alone"))


def left(assignment: Assignment) -> list[str]:
    """Names of what lies beside the models of a run that ended."""
    return [Path(entry.path).name for entry in assignment.storage.list(assignment.run)]


def test_two_workers_make_the_model_of_one(ready):
    """The fifth task has more data of the second, and starts from it with the dictionary."""
    assignment = ready.anew()
    assignment.storage.write_text(f"{assignment.run}/tasks/failed-before", "an earlier attempt's")
    first, second = ready.run(assignment)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert ready.hash_of(assignment) == ready.weights
    mine = {line for line in second.stdout.splitlines() if line.startswith("partial_hn ")}
    assert mine == {f"partial_hn {task} {epoch}" for task in (1, 3) for epoch in (1, 2, 3)}
    ends = [line for line in first.stdout.splitlines() if line.endswith("end")]
    assert ends == [f"partial_hn {task} end" for task in range(5)]
    assert left(assignment) == ["failed-before"]


def test_bounds_have_one_worker_each_killed_or_not(ready):
    """naive is the second worker's, joint the first one's."""
    names = ("naive", "joint")
    train = dataclasses.replace(CONFIG.train, compare=names)
    assignment = ready.anew(config=dataclasses.replace(ready.assignment.config, train=train))
    killed = ready.run(assignment, (), (2, 1, "naive"))
    assert killed[1].returncode == -signal.SIGKILL
    first, second = ready.run(assignment)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    tasks = open_task_features(open_store(assignment.storage), assignment.slots)
    found = json.loads(first.stdout.splitlines()[-1])
    for name in names:
        alone = Learner(assignment.cut.strategy(with_strategy(CONFIG, name)), CONFIG.train)
        list(alone.learn(tasks))
        assert found[name] == Outcome.of(alone).accuracy_TT
    assert found["partial_hn"][4] != found["naive"][4]
    lines = second.stdout.splitlines()
    assert not any(line.startswith("joint") for line in lines)
    assert "naive 1 1" not in lines, "the second task was learned before"
    assert {"naive 1 end", "naive 2 1", "naive 4 end"} <= set(lines)
    assert sorted(left(assignment)) == ["joint.json", "naive.json"]


@pytest.mark.parametrize("ends", [((), (3, 2)), ((2, 2), ())], ids=["second", "first"])
def test_one_is_killed_in_a_task_and_started_again(ready, ends):
    assignment = ready.anew()
    killed = ready.run(assignment, *ends)
    assert killed[1 if ends[1] else 0].returncode == -signal.SIGKILL
    done = ready.run(assignment)
    assert [ended.returncode for ended in done] == [0, 0]
    assert ready.hash_of(assignment) == ready.weights
    assert "partial_hn 0 1\n" not in done[0].stdout, "the first task was learned before"


def test_what_stops_one_stops_the_other_with_the_same_words(ready):
    train = dataclasses.replace(CONFIG.train, learning_rate=1e30)
    assignment = ready.anew(config=dataclasses.replace(ready.assignment.config, train=train))
    for ended in ready.run(assignment):
        assert ended.returncode == 1
        assert ended.stderr.startswith(
            "error: the loss of task '0' became nan in epoch 1; allowed:")


def test_tasks_learned_at_once_make_the_model_of_one_after_the_other_killed_or_not(ready):
    """Three threads; the process is killed while it learns the tasks after the first."""
    assignment = ready.at_once(3, compare=("naive",))
    killed = ready.alone(assignment, 2, 2)
    assert killed.returncode == -signal.SIGKILL
    done = ready.alone(assignment)
    assert done.returncode == 0, done.stderr
    assert ready.hash_of(assignment) == ready.weights
    lines = done.stdout.splitlines()
    assert "partial_hn 0 1" not in lines, "the first task was learned before"
    ends = [line for line in lines if line.startswith("partial_hn") and line.endswith("end")]
    assert ends == [f"partial_hn {task} end" for task in range(5)]
    wanted, found = (lineage.outcome_of(lineage.find(
        each.storage.filesystem, each.folder, each.lineage_ids))
        for each in (ready.assignment, assignment))
    assert [dataclasses.replace(epoch, seconds=0) for epoch in found.epochs] == [
        dataclasses.replace(epoch, seconds=0) for epoch in wanted.epochs]
    assert found.accuracy_TT == wanted.accuracy_TT
    assert [record.without_id for record in found.finished] == [
        record.without_id for record in wanted.finished]
    assert json.loads(lines[-1])["partial_hn"] == found.accuracy_TT
    assert left(assignment) == ["naive.json"]
    again = ready.alone(assignment)  # of all tasks and the baseline nothing is learned again
    assert again.returncode == 0, again.stderr
    assert not any(line.startswith("naive") for line in again.stdout.splitlines())
    assert json.loads(again.stdout.splitlines()[-1]) == json.loads(lines[-1])


def test_what_stops_a_thread_stops_the_worker_with_its_words(ready):
    done = ready.alone(ready.at_once(3, learning_rate=1e30))
    assert done.returncode == 1
    assert done.stderr.startswith("error: the loss of task '0' became nan in epoch 1; allowed:")


@pytest.mark.parametrize(("known", "shares"), [
    (0, [[0, 3], [1, 4], [2]]), (2, [[3], [4], [2]]), (5, [[], [], []])])
def test_every_task_has_one_worker_whatever_is_known(known, shares):
    found = [list(WorkerRank(None, "", "", "", rank, 3).own_tasks(known, 5)) for rank in range(3)]
    assert found == shares


def test_an_error_of_the_listener_ends_what_is_learned_at_once(ready):
    """As the gate of `retrain` stops a task: the last one is not learned behind it."""
    given = ready.at_once(2)
    config, stream = given.config, uuid.uuid4().hex

    def listen(_, record):
        if isinstance(record, TaskRecord) and record.task_index == 1:
            raise ZeroDivisionError

    with open_execution(config, given.storage, stream, Progress(config, lambda _: None)) as stages:
        with pytest.raises(ZeroDivisionError):
            stages.learn(given.cut, given.slots, given.lineage_ids, listen)
        assert 1 < len(stages.learned(given.lineage_ids)) < len(given.slots)


@pytest.mark.parametrize(("strategy", "shared_by"), [("partial_hn", 4), ("naive", 1)])
def test_threads_are_divided_where_tasks_can_be_learned_at_once(ready, monkeypatch, strategy,
                                                                shared_by):
    given = ready.at_once(4)
    config = with_strategy(given.config, strategy)
    threads = []
    with open_execution(config, given.storage, uuid.uuid4().hex,
                        Progress(config, lambda _: None)) as stages:
        stages.config = dataclasses.replace(
            config, compute=dataclasses.replace(config.compute, threads=None))
        monkeypatch.setattr("os.cpu_count", lambda: 8)
        monkeypatch.setattr(stages, "_learn", lambda task, _: threads.append(task.threads))
        stages.learn(given.cut, given.slots, given.lineage_ids, lambda *_: None)
    assert threads == [8 // shared_by]


def test_what_the_features_say_is_printed_and_kept_for_the_result(ready, monkeypatch):
    """The device has memory for 32 images at once."""
    def short(trunk, depths, images_BCHW, together):
        if together > 32:
            raise torch.OutOfMemoryError("far out of memory. Tried to allocate 8 bytes.")
        yield from outputs_at(trunk, depths, images_BCHW, together)

    monkeypatch.setattr("partialhn.features.shards.outputs_at", short)
    config = dataclasses.replace(CONFIG, features=dataclasses.replace(
        CONFIG.features, feature_dtype="float32"))
    storage, lines = ready.assignment.storage, []
    cut = ready.assignment.cut
    jobs = feature_jobs(config, open_data(config.data, storage)[:1], cut.trunk)
    with open_execution(config, storage, "short", Progress(config, lines.append)) as stages:
        stages.features(jobs, cut)
        assert len(stages.notes) == 1
        assert "half as many images at once" in stages.notes[0]
        assert stages.notes[0] in "\n".join(lines)


def test_that_a_task_diverged_is_told_to_other_processes():
    """Through the storage, as a result of Ray Train, and pickled."""
    error = DivergedError("the loss became nan", "a")
    for found in (error_of(json.loads(json.dumps(error_fields(error)))),
                  pickle.loads(pickle.dumps(error))):
        assert (type(found), str(found), found.task) == (DivergedError, str(error), "a")
    assert type(error_of(error_fields(InputError("no such file")))) is InputError
