"""What arrives: when it is ready, in which order, and what is refused before any training."""

import dataclasses
import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from partialhn.config import DataConfig
from partialhn.errors import InputError, IntegrityError
from pipelines.platform.local_files import LocalFiles
from pipelines.platform.storage import open_storage
from pipelines.retrain.inbox import Inbox, Problem
from pipelines.retrain.proposal import propose
from pipelines.retrain.validate import (
    ArrivalPolicy,
    check_arrival,
    read_hashes,
    write_hashes,
)
from pipelines.serving.drift import DriftReport, TaskDrift

DATA = DataConfig(data="inbox", input_size=16)


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


class World:
    """A storage with an inbox."""

    def __init__(self, root):
        self.root = root / "inbox"
        self.storage = open_storage(str(root))
        self.inbox = Inbox(self.storage)

    def put(self, task, classes=("x", "y"), first=0, images=8, ready=100, tests=3):
        """A task of image folders; images are numbered from `first`."""
        for part, count in (("train", images), ("test", tests)):
            for label in classes:
                folder = self.root / task / part / label
                folder.mkdir(parents=True, exist_ok=True)
                for number in range(count):
                    first += 1
                    (folder / f"{number}.png").write_bytes(png(first))
        if ready is not None:
            self.ready(task, ready)

    def ready(self, task, when=100):
        marker = self.root / task / "_READY"
        marker.write_text("")
        os.utime(marker, (when, when))

    def scan(self, learned=(), quiet=None):
        found = self.inbox.scan(dict.fromkeys(learned, "of other files"), quiet)
        return found.arrivals, found.waiting

    def one(self):
        arrivals, _ = self.scan()
        assert len(arrivals) == 1, arrivals
        return arrivals[0]

    def check(self, policy=None, earlier=None, classes=None, data=DATA):
        return check_arrival(self.storage, self.one(), data, policy or ArrivalPolicy(),
                             earlier or {}, classes)

    def problems(self, **arguments):
        return [(each.code, each.text) for each in self.check(**arguments).problems]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


# When, and in which order ---------------------------------------------------------------------


def test_ready_by_marker_then_by_natural_name(world):
    for task, when in (("task-10", 200), ("task-9", 200), ("late", 300), ("early", 100)):
        world.put(task, ready=when)
    world.put("unfinished", ready=None)
    arrivals, waiting = world.scan()
    assert [each.slot for each in arrivals] == ["early", "task-9", "task-10", "late"]
    assert waiting == ["unfinished: has no _READY marker yet"]
    assert [each.slot for each in world.scan(learned={"early", "late"})[0]] == ["task-9", "task-10"]


def test_a_proposal_waits_for_labelled_images(world):
    cats = TaskDrift("cats", 60, 60, 600, 0.7, 0.08, False)
    report = DriftReport("models:/s/3", 24, 0.01, (cats,), 40, examples=("a.png", "b.png"))
    assert propose(world.storage, "s", dataclasses.replace(report, unknown=5)) is None
    folder = propose(world.storage, "s", report)
    assert propose(world.storage, "s", report) == folder, "it still waits"
    assert propose(world.storage, "other", report) == f"{folder}-2"
    note = json.loads((Path(folder) / "_PROPOSED.json").read_text())
    assert (note["share"], note["examples"]) == (0.4, ["a.png", "b.png"])
    name = Path(folder).name
    for quiet in (None, 5):
        arrivals, waiting = world.scan(quiet=quiet)
        assert arrivals == []
        assert [text.split(",")[0] for text in waiting] == [
            f"{each}: is proposed by `partialhn drift`" for each in (name, f"{name}-2")]
    world.put(name, ready=None)
    assert world.scan()[1][0] == f"{name}: has no _READY marker yet"
    world.ready(name)
    assert not world.check().problems
    assert propose(world.storage, "s", report) != folder


def test_ready_by_a_quiet_period(world, monkeypatch):
    """What counts is when a file arrived, and not the time that its copy was given."""
    world.put("old", ready=None)
    world.put("part", ready=None)
    table = world.root / "table"
    table.mkdir()
    for number in range(6):
        (table / f"{number}.png").write_bytes(png(number))
    (table / "metadata.csv").write_text("file_name,label\n" + "".join(
        f"{number}.png,00{number % 2}\n" for number in range(6)))
    os.utime(table / "0.png", (2e9, 2e9))
    time.sleep(0.05)
    later = time.time() + 300
    time.sleep(0.05)
    world.put("copied", ready=None)
    for file in (world.root / "copied").rglob("*.png"):
        os.utime(file, (1000, 1000))
    (world.root / "part" / "test" / ".test.parquet.Xa81kQ").write_bytes(b"PAR1")
    monkeypatch.setattr(LocalFiles, "now", lambda *_: later)
    arrivals, waiting = world.scan(quiet=5)
    assert [each.slot for each in arrivals] == ["old", "table"]
    checked = check_arrival(world.storage, arrivals[1], DATA, ArrivalPolicy(), {}, None)
    assert checked.experience.classes == ("000", "001")
    assert [line.split(" changed ")[0] for line in waiting] == ["copied:", "part:"]


def test_more_data_of_a_task(world):
    world.put("cats")
    world.put("cats/2026-11", first=500, ready=400)
    arrivals, _ = world.scan()
    assert [(each.task, each.part) for each in arrivals] == [("cats", ""), ("cats", "2026-11")]
    assert not any("2026-11" in entry.path for entry in arrivals[0].files)
    assert [each.slot for each in world.scan(learned={"cats"})[0]] == ["cats/2026-11"]


def test_an_inbox_that_does_not_exist_is_said(world):
    arrivals, [line] = world.scan()
    assert arrivals == []
    assert line == f"nothing can arrive, because {world.root} does not exist"
    world.root.mkdir()
    assert world.scan() == ([], [])


# What would be dropped without a word ----------------------------------------------------------


def test_files_of_a_learned_task_that_are_not_those_learned(world):
    world.put("cats")
    signature = world.one().signature

    def not_used(slot="cats"):
        return world.inbox.scan({"cats": signature, slot: signature}).not_used

    assert not_used() == []
    os.utime(world.root / "cats" / "_READY", (900, 900))
    assert not_used() == [], "a marker alone is no news"
    (world.root / "cats" / "train" / "x" / "new.png").write_bytes(png(900))
    [line] = not_used()
    assert line.startswith("cats: its files are not those that were learned (changed, added")
    assert "inbox/cats/NAME/" in line
    assert "`replaces: true` in its task.yaml" in line
    shutil.rmtree(world.root / "cats" / "train")
    shutil.rmtree(world.root / "cats" / "test")
    assert not_used() == [], "images may be deleted once they are learned"
    world.put("cats/2026-11")
    assert [line.split(":")[0] for line in not_used("cats/2026-11")] == ["cats/2026-11"]


def test_images_that_belong_to_no_arrival(world):
    for label in "ab":
        (world.root / "cats" / label).mkdir(parents=True)
        (world.root / "cats" / label / "1.png").write_bytes(png(1))
    assert world.scan() == ([], ["cats: has no _READY marker yet"])
    world.ready("cats")
    arrivals, [line] = world.scan()
    assert arrivals == []
    assert line.startswith("cats: the images in its folders a, b belong to no arrival; allowed:")
    world.put("dogs")
    world.put("dogs/2026-11", first=500)
    shutil.copytree(world.root / "dogs" / "train", world.root / "dogs" / "dev")
    arrivals, waiting = world.scan(learned={"dogs"})
    assert [each.slot for each in arrivals] == ["dogs/2026-11"]
    assert waiting[1].startswith("dogs: the images in its folders dev belong to no arrival")


def test_a_ready_task_whose_folders_are_empty_is_said(world):
    """Otherwise a pass would say that there is nothing to do."""
    (world.root / "cats" / "train" / "x").mkdir(parents=True)
    world.ready("cats")
    assert world.scan() == ([], ["cats: has _READY, but its folders hold no images"])
    assert world.scan(learned={"cats"}) == ([], []), "images may be deleted once they are learned"
    assert world.scan(learned={"cats/2026-11"})[1], "the task's own folder is not learned yet"


def test_an_arrival_of_a_task_that_train_has_learned(world):
    world.put("cats")
    [line] = world.inbox.scan({"cats": ""}).not_used
    assert line.startswith("cats: `partialhn train` has learned this task")


def test_a_part_without_a_marker_and_a_file_beside_the_folders_are_said(world):
    world.put("cats")
    world.put("cats/2026-11", ready=None)
    (world.root / "dogs.zip").write_bytes(b"PK")
    (world.root / "_notes.txt").write_text("ours")
    (world.root / ".DS_Store").write_text("")
    assert world.scan(learned={"cats"}) == ([], [
        "dogs.zip: is a file; allowed: a folder for each task",
        "cats/2026-11: has no _READY marker yet"])


def test_a_part_that_replaces_its_task(world):
    """It may have other classes, and images that the task had; a part that adds may not."""
    world.put("cats")
    first = world.check()
    shutil.rmtree(world.root / "cats")
    world.put("cats/new", classes=("x", "z"))
    earlier, classes = {"cats": first.hashes}, ("x", "y")
    assert {code for code, _ in world.problems(earlier=earlier, classes=classes)} == {"data"}
    (world.root / "cats" / "new" / "task.yaml").write_text("replaces: true")
    checked = world.check(earlier=earlier, classes=classes)
    assert checked.problems == ()
    assert (checked.experience.name, checked.experience.classes) == ("cats/=new", ("x", "z"))
    [(code, _)] = world.problems(earlier={"dogs": first.hashes}, classes=classes)
    assert code == "duplicate"
    shutil.move(world.root / "cats" / "new" / "task.yaml", world.root / "task.yaml")
    shutil.rmtree(world.root / "cats")
    world.put("cats")
    shutil.move(world.root / "task.yaml", world.root / "cats" / "task.yaml")
    assert "replaces is given in the task.yaml of the new task 'cats'" in str(world.problems())


# What is sound --------------------------------------------------------------------------------


def test_a_sound_task(world):
    world.put("cats")
    checked = world.check()
    assert checked.problems == ()
    assert checked.experience.classes == ("x", "y")
    parts = (checked.experience.train, checked.experience.validation, checked.experience.test)
    assert [len(part) for part in parts] == [14, 2, 6]
    assert len(np.unique(checked.hashes)) == 22


def test_what_is_left_out_is_known(world):
    world.put("cats")
    (world.root / "cats" / "train" / "z").mkdir()
    (world.root / "cats" / "train" / "x" / "new.avif").write_bytes(b"?")
    checked = world.check()
    assert checked.problems == ()
    assert checked.experience.not_used.classes == ("z",)
    assert checked.experience.not_used.files == {".avif": 1}


def test_what_file_systems_leave_is_no_data(world):
    world.put("cats")
    for folder in ("@eaDir", "lost+found", "cats/@eaDir/2026", "cats/train/@eaDir/x",
                   "cats/train/x/@eaDir/0.png"):
        (world.root / folder).mkdir(parents=True)
        (world.root / folder / "SYNOFILE_THUMB_M.png").write_bytes(png(7))
    world.ready("cats")
    assert [arrival.slot for arrival in world.scan()[0]] == ["cats"]
    assert len(world.check().experience.train) == 14


def test_parquet_too(world):
    folder = world.root / "cats"
    folder.mkdir(parents=True)
    for part, first in (("train", 0), ("test", 100)):
        rows = [{"bytes": png(first + n), "path": ""} for n in range(20)]
        pq.write_table(pa.table({"image": rows, "label": [n % 2 for n in range(20)]}),
                       folder / f"{part}.parquet")
    world.ready("cats")
    checked = world.check()
    assert checked.problems == ()
    assert len(checked.experience.test) == 20
    content = bytearray((folder / "train.parquet").read_bytes())
    content[len(content) // 3:len(content) // 2] = b"\0" * (len(content) // 2 - len(content) // 3)
    (folder / "train.parquet").write_bytes(content)
    assert world.problems()[0][0] in ("data", "image")


def test_unreadable_images_are_all_looked_for(world):
    world.put("cats", images=20)
    for number in range(12):
        (world.root / "cats" / "train" / "x" / f"{number}.png").write_bytes(b"no image")
    problems = world.problems()
    assert {code for code, _ in problems} >= {"image"}
    named = [text for code, text in problems if code == "image"]
    assert len(named) == 11
    assert "cats/train/x/" in named[0]
    assert named[-1].endswith("more such images")
    skipping = DataConfig(data="inbox", input_size=16, on_bad_image="skip")
    assert world.problems(data=skipping) == []


@pytest.mark.parametrize(("change", "code", "text"), [
    (lambda root: (root / "test" / "z").mkdir() or (root / "test" / "z" / "0.png").write_bytes(
        png(9)), "data", "'z'"),
    (lambda root: (root / "task.yaml").write_text("classes: [x]"), "data",
     "label 'y' is not declared"),
    (lambda root: (root / "task.yaml").write_text("classes: [x, y, z]"), "data",
     "class 'z' is declared"),
    (lambda root: (root / "task.yaml").write_text("colours: 3"), "data", "colours"),
    (lambda root: (root / "task.yaml").write_text("[" * 3000), "data", "task.yaml"),
    (lambda root: (root / "task.yaml").write_text("transform: swirl"), "data", "swirl"),
    (lambda root: [file.unlink() for file in sorted((root / "train" / "x").iterdir())[2:]],
     "few", "class 'x' has 2 training images; allowed: 4 or more"),
    (lambda root: (root / "test" / "x" / "0.png").write_bytes(
        (root / "train" / "x" / "0.png").read_bytes()), "duplicate", "test images are training"),
])
def test_what_is_wrong_is_said(world, change, code, text):
    world.put("cats")
    change(world.root / "cats")
    world.ready("cats")
    assert any(found == code and text in said for found, said in world.problems()), (
        world.problems())


def test_training_images_are_counted_before_any_are_held_out(world):
    for count, said in ((4, None), (3, "3 training images"), (1, "1 training image")):
        for file in sorted((world.root / "cats" / "train").glob("*/*"), reverse=True):
            file.unlink()
        world.put("cats", images=count)
        assert world.problems() == ([] if said is None else [
            ("few", f"class {label!r} has {said}; allowed: 4 or more") for label in "xy"])


def test_images_of_an_earlier_task(world, tmp_path):
    world.put("cats")
    hashes = world.check().hashes
    path = world.storage.path("streams", "s", "images", "f.parquet")
    write_hashes(world.storage, path, hashes)
    assert np.array_equal(read_hashes(world.storage, path), hashes)
    earlier = {"dogs": np.array([1], np.uint64), "old": hashes[:5]}
    [(code, text)] = world.problems(earlier=earlier)
    assert code == "duplicate"
    assert "23% of its images are those of task 'old'" in text
    assert world.problems(earlier=earlier, policy=ArrivalPolicy(max_duplicate_share=0.5)) == []
    world.storage.write_text(path, "PAR1 nonsense")
    with pytest.raises(IntegrityError, match="image hashes"):
        read_hashes(world.storage, path)


def test_more_data_is_numbered_by_the_tasks_own_classes(world):
    world.put("cats", classes=("y",))
    checked = world.check(classes=("x", "y", "z"))
    assert checked.problems == ()
    assert checked.experience.classes == ("x", "y", "z")
    assert set(checked.experience.train.label_N) == {1}
    [(code, text)] = world.problems(classes=("x", "z"))
    assert (code, "class 'y'" in text) == ("data", True)


@pytest.mark.parametrize("values", [{"max_duplicate_share": 2}, {"min_images_per_class": 0}])
def test_a_policy_is_checked(values):
    with pytest.raises(InputError, match=next(iter(values))):
        ArrivalPolicy(**values)


# Names and paths ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a b", "-x", "über", "x" * 101, "a\nb", "a;b", "..."])
def test_a_name_that_is_not_taken(world, name):
    world.put(name)
    problems = world.inbox.name_problems(world.one(), [])
    assert problems
    assert problems[0].code == "name"


def test_names_that_differ_in_case_only(world):
    world.put("Cats")
    assert world.inbox.name_problems(world.one(), ["dogs"]) == []
    [problem] = world.inbox.name_problems(world.one(), ["dogs", "cats"])
    assert "differ in case only" in problem.text


def test_paths_that_lead_out(world, tmp_path):
    world.put("cats")
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "0.png").write_bytes(png(1))
    (world.root / "cats" / "train" / "x" / "link.png").symlink_to(secret / "0.png")
    (world.root / "cats" / "train" / "z").symlink_to(secret)
    (world.root / "cats" / "train" / "x" / "a\x07b.png").write_bytes(png(2))
    (world.root / "cats" / "train" / "x" / "inner.png").symlink_to("0.png")
    problems = world.inbox.name_problems(world.one(), [])
    assert {problem.code for problem in problems} == {"path"}
    assert len(problems) == 3
    assert sum("is a link to" in problem.text for problem in problems) == 2


def test_a_task_folder_that_is_a_link(world, tmp_path):
    World(tmp_path / "other").put("real")
    world.root.mkdir()
    (world.root / "cats").symlink_to(tmp_path / "other" / "inbox" / "real")
    problems = world.inbox.name_problems(world.one(), [])
    assert any("is a link to" in problem.text for problem in problems)


# Rejections -----------------------------------------------------------------------------------


def test_a_rejection_says_why_and_holds_until_something_changes(world):
    world.put("cats", images=2)
    checked = world.check()
    world.inbox.reject(checked.arrival, "policy-1", checked.problems)
    said = json.loads((world.root / "cats" / "_REJECTED.json").read_text())
    assert said["task"] == "cats"
    assert set(said["codes"]) == {"few"}
    assert "training images" in said["reasons"][0]
    again = world.one()
    assert again.signature == checked.arrival.signature
    assert world.inbox.rejected(again, "policy-1", "train-1")["reasons"] == said["reasons"]
    assert world.inbox.rejected(again, "policy-2", "train-1") is None
    world.put("cats", images=9, first=900)
    mended = world.one()
    assert world.inbox.rejected(mended, "policy-1", "train-1") is None
    assert world.check().problems == ()
    world.inbox.accept(mended)
    assert not (world.root / "cats" / "_REJECTED.json").exists()


def test_a_rejection_of_what_diverged_holds_until_the_options_of_training_change(world):
    world.put("cats")
    arrival = world.one()
    world.inbox.reject(arrival, "policy-1", [Problem("diverged", "the loss became nan")], "train-1")
    assert world.inbox.rejected(arrival, "policy-1", "train-1")["codes"] == ["diverged"]
    for policy, training in (("policy-2", "train-1"), ("policy-1", "train-2")):
        assert world.inbox.rejected(arrival, policy, training) is None


def test_a_rejected_folder_is_checked_again_under_another_name(world):
    for old, new in (("f spaces", "spaces"), ("pets/1 more", "pets/more")):
        world.put(old)
        [found] = [each for each in world.scan()[0] if each.slot == old]
        world.inbox.reject(found, "policy", world.inbox.name_problems(found, []))
        assert world.inbox.rejected(found, "policy", "train")
        (world.root / old).rename(world.root / new)
        [found] = [each for each in world.scan()[0] if each.slot == new]
        assert (world.root / new / "_REJECTED.json").exists()
        assert world.inbox.rejected(found, "policy", "train") is None
