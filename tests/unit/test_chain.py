"""Tasks are learned once: what was learned before is found, whatever has arrived since."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.config import Config
from partialhn.errors import IntegrityError
from partialhn.features.feature_set import join
from partialhn.predict import Predictor
from partialhn.run import run_stream
from partialhn.training import lineage
from partialhn.training.experience import TaskFeatures
from partialhn.training.learner import Learner
from partialhn.training.lineage import lineage_ids_of
from partialhn.training.records import EpochRecord
from partialhn.training.result import Outcome
from partialhn.training.slots import Slot

pytestmark = pytest.mark.trains
CONFIG = Config.from_dict({
    "data": {"input_size": 16}, "backbone": {"freeze_depth": 3, "trunk_epochs": 1},
    "features": {"views": 1, "augment": "none"}, "hypernet": {"fresh_columns": 4},
    "train": {"epochs": 2, "batch_size": 16}, "compute": {"threads": 1}})


def add_tasks(folder: Path, *tasks: int) -> Config:
    """Two digits a task, as image folders; returns the configuration of the directory."""
    digits = load_digits()
    for task in tasks:
        for label in (2 * task, 2 * task + 1):
            pixels_NHW = (digits.images[digits.target == label] * 15.9).astype(np.uint8)
            for part, rows in (("train", range(24)), ("test", range(24, 32))):
                target = folder / f"task-{task}" / part / str(label)
                target.mkdir(parents=True)
                for row in rows:
                    Image.fromarray(pixels_NHW[row]).save(target / f"{row}.png")
    return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, data=str(folder)))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A directory of 3 tasks was learned, 2 arrived, and it was learned again: result, records."""
    folder = tmp_path_factory.mktemp("grown")
    run_stream(add_tasks(folder / "data", 0, 1, 2), folder / "store")
    config = add_tasks(folder / "data", 3, 4)
    for kept in (folder / "store" / "features").iterdir():  # of the first tasks, tests remain
        if (kept / "manifest.json").read_text().count('"rows": 16') == 0:
            shutil.rmtree(kept)
    records = []
    result = run_stream(config, folder / "store", records.append)
    return folder, result.model, result.fields, records


def test_three_tasks_and_two_more_are_five_at_once(grown, tmp_path):
    folder, model, fields, _ = grown
    config = add_tasks(tmp_path / "data", 0, 1, 2, 3, 4)
    once = run_stream(config, tmp_path / "store")
    at_once = once.fields
    assert model.weights_hash() == once.model.weights_hash()
    assert fields["accuracy_matrix"] == at_once["accuracy_matrix"]
    assert ([(e["task"], e["epoch"], e["loss"]) for e in fields["epochs"]]
            == [(e["task"], e["epoch"], e["loss"]) for e in at_once["epochs"]])
    assert {p.name for p in (folder / "store" / "learned").iterdir()} == {
        p.name for p in (tmp_path / "store" / "learned").iterdir()}


def test_only_new_tasks_are_learned_and_their_images_read(grown):
    _, _, fields, records = grown
    assert {r.task for r in records if isinstance(r, EpochRecord)} == {"task-3", "task-4"}
    assert fields["images_decoded"] == 2 * 64
    assert [task["train_images"] for task in fields["tasks"]][:3] == [0, 0, 0]


@dataclasses.dataclass(frozen=True)
class Task:
    name: str
    fingerprint: str


def test_a_prefix_says_what_was_learned_and_on_what():
    tasks = [Task("a", "1"), Task("b", "2"), Task("c", "3")]

    def lineage_ids(config=CONFIG, network="n", tasks=tasks):
        return lineage_ids_of(config, network, tasks)

    def changed(section, **values):
        return dataclasses.replace(CONFIG, **{
            section: dataclasses.replace(getattr(CONFIG, section), **values)})

    first = lineage_ids()
    assert len(set(first)) == 3
    assert lineage_ids(tasks=tasks[:2]) == first[:2]
    assert lineage_ids(changed("train", compare=("naive",))) == first
    assert lineage_ids(changed("compute", workers=2)) == first
    assert lineage_ids(changed("data", data="/elsewhere", validation=0.2)) == first
    for other in (lineage_ids(changed("train", epochs=3)), lineage_ids(network="m"),
                  lineage_ids(changed("hypernet", beta=1.0)),
                  lineage_ids(changed("backbone", freeze_depth=2))):
        assert not set(other) & set(first)
    swapped = lineage_ids(tasks=[tasks[0], tasks[2], tasks[1]])
    assert swapped[0] == first[0]
    assert swapped[1:] != first[1:]
    known = lineage_ids_of(changed("train", epochs=3), "n", tasks, first[:2])
    assert known[:2] == first[:2]
    assert known[2] != first[2]


def test_a_damaged_record_is_named(grown):
    folder = grown[0] / "store" / "learned"
    filesystem, lineage_id = pafs.LocalFileSystem(), "f" * 32
    assert lineage.find(filesystem, str(folder), [lineage_id]) == []
    shutil.copytree(next(path.parent for path in folder.glob("*/model.json")), folder / lineage_id)
    with pytest.raises(IntegrityError, match=f"model {lineage_id} says it is"):
        lineage.find(filesystem, str(folder), [lineage_id])
    (folder / lineage_id / "model.json").write_text("{")
    with pytest.raises(IntegrityError, match=lineage_id):
        lineage.find(filesystem, str(folder), [lineage_id])
    shutil.rmtree(folder / lineage_id)


# A task that gets more data -------------------------------------------------------------------


def test_a_refreshed_task_has_a_slot_of_its_own_and_nothing_else_changes(cut, tasks, config,
                                                                        tmp_path):
    learner = Learner(cut.strategy(config), config.train)
    list(learner.learn(tasks[:2]))
    before = {key: value.clone() for key, value in learner.strategy.state_dict().items()
              if key.startswith("tasks.")}
    with torch.no_grad():
        answers = learner.strategy(tasks[0].test.gather(torch.arange(8), torch.zeros(8).long()), 0)
    more = TaskFeatures("0/more", tasks[0].classes, join([tasks[0].train, tasks[0].train]), None,
                        tasks[0].test, 0)
    list(learner.learn([*tasks[:2], more]))
    state = learner.strategy.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    with torch.no_grad():
        again = learner.strategy(tasks[0].test.gather(torch.arange(8), torch.zeros(8).long()), 0)
    assert torch.equal(answers, again)
    model = Model(config, cut.trunk, learner.strategy,
                  tuple(TaskInfo(name, ("x", "y")) for name in ("0", "1", "0/more")))
    model.save(tmp_path / "model")
    predictor = Predictor.load(tmp_path / "model")
    assert predictor.model.weights_hash() == model.weights_hash()
    assert predictor.tasks == ["0", "1"]
    assert [predictor.task_index(name) for name in ("0", "1", "0/more")] == [2, 1, 2]


def test_a_refreshed_task_starts_from_its_old_classifier(cut, tasks, config):
    strategy = cut.strategy(config)
    for refreshes in (None, None, 0):
        strategy.add_task(2, refreshes)
    assert torch.equal(strategy.tasks[2].classifier_KF, strategy.tasks[0].classifier_KF)
    assert not torch.equal(strategy.tasks[1].classifier_KF, strategy.tasks[0].classifier_KF)


def test_an_outcome_is_put_together_from_what_was_kept(cut, tasks, config, tmp_path):
    learner = Learner(cut.strategy(config), config.train)
    list(learner.learn(tasks[:2]))
    outcome, lineage_ids = Outcome.of(learner), ("p" * 32, "q" * 32)
    slots = [Slot(name, ("x", "y"), name, "none", {}) for name in "ab"]
    for index in range(2):
        model = Model(config, cut.trunk, learner.strategy,
                      tuple(TaskInfo(slot.name, slot.classes) for slot in slots))
        lineage.keep(model, lineage.Learned.of(outcome, lineage_ids, index), pafs.LocalFileSystem(),
                   str(tmp_path))
    found = lineage.find(pafs.LocalFileSystem(), str(tmp_path), [*lineage_ids, "r" * 32])
    assert lineage.outcome_of(found) == outcome
    assert [each.parent for each in found] == ["", lineage_ids[0]]
