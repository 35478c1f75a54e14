"""A stream's life through its inbox: tasks arrive, one is poisoned, one rolled back, one grows."""

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from partialhn.errors import InputError, IntegrityError
from partialhn.run import run_stream
from partialhn.training import lineage
from pipelines.execution import base
from pipelines.features.produce import open_store
from pipelines.platform.lease import Lease
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from pipelines.registry.models import repaired
from pipelines.registry.verify import verify
from pipelines.report.page import render
from pipelines.retrain import chapters, learning
from pipelines.retrain.journal import Journal, chain_to, slots_of
from pipelines.retrain.run import retrain
from pipelines.retrain.seen import Seen, hashes_of
from pipelines.settings import RetrainConfig
from pipelines.show import show
from pipelines.upkeep.prune_versions import choose, prune
from tests.processes import Forked, partialhn
from tests.support import small_config

CONFIG = small_config(data={"data": "inbox"})


def put_task(inbox: Path, task: str, labels: tuple[int, int], rows=range(60), seed=None) -> None:
    """Two digits as image folders, a fifth of them for testing; `seed` shuffles the labels."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    for label in labels:
        pixels_NHW = (digits.images[digits.target == label] * 15.9).astype(np.uint8)
        for number in rows:
            shown = label if seed is None else rng.choice(labels)
            folder = inbox / task / ("test" if number % 5 == 0 else "train") / str(shown)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels_NHW[number]).save(folder / f"{label}-{number:03d}.png")
    (inbox / task / "_READY").write_text("")


def put_png(row: int) -> bytes:
    """One image of a digit."""
    sink = io.BytesIO()
    pixels_HW = (load_digits().images[row] * 15.9).astype(np.uint8)
    Image.fromarray(pixels_HW).save(sink, "PNG")
    return sink.getvalue()


class Stream:
    """A stream in a folder, and what each pass over it said."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "config.yaml").write_text(yaml.safe_dump(CONFIG.to_dict()))
        (root / "policy.yaml").write_text("max_loss_on_earlier_task: 0.02\n"
                                          "min_above_chance: 0.3\ninbox: {min_test_images: 4}\n")
        self.storage = open_storage(str(root / "store"))
        self.inbox = root / "store" / "inbox"

    def settings(self, **changes):
        settings = RetrainConfig("digits", str(self.root / "store"),
                                 policy=str(self.root / "policy.yaml"),
                                 config=str(self.root / "config.yaml"))
        return dataclasses.replace(settings, **changes)

    def run(self, **changes):
        return retrain(self.settings(**changes), lambda line: None)

    @property
    def registry(self):
        return connect(self.storage)

    def versions(self):
        return self.registry.versions("digits")


@pytest.fixture(scope="module")
def life(module_without_ray, tmp_path_factory):
    """Every pass of the life by name, and the stream at its end. A chapter has two tasks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapters, "TASKS", 2)
        yield whole_life(tmp_path_factory)


def whole_life(tmp_path_factory):
    stream, passes = Stream(tmp_path_factory.mktemp("life")), {}
    put_task(stream.inbox, "a", (0, 1))
    put_task(stream.inbox, "b", (2, 3))
    put_task(stream.inbox, "copy", (0, 1))
    (stream.inbox / "bad name").mkdir()
    (stream.inbox / "bad name" / "_READY").write_text("")
    passes["dry"] = stream.run(dry_run=True)
    stream.after_dry = sorted(p.name for p in (stream.root / "store").iterdir())
    passes["founding"] = stream.run()
    passes["again"] = stream.run()
    put_task(stream.inbox, "poison", (4, 5), seed=1)
    put_task(stream.inbox, "c", (6, 7))
    with pytest.MonkeyPatch.context() as patch:  # the pass dies after its first decision
        patch.setattr(learning, "register", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            stream.run()
    passes["repaired"] = stream.run()
    stream.learned = {v.task: v.tags["weights_hash"] for v in stream.versions()}
    passes["not again"] = stream.run()
    registry = stream.registry
    from pipelines.registry.history import Move
    registry.aliases.move("digits", Move("champion", 2, "rollback", "c is not wanted"))
    passes["rolled back"] = stream.run()
    put_task(stream.inbox, "a/2026-11", (0, 1), rows=range(60, 120))
    passes["refresh"] = stream.run()
    put_task(stream.inbox, "b", (2, 3), rows=range(60, 80))
    passes["sent again"] = stream.run()
    put_task(stream.inbox, "b/2026-12", (2, 8), rows=range(60))
    (stream.inbox / "b" / "2026-12" / "task.yaml").write_text("replaces: true")
    with pytest.MonkeyPatch.context() as patch:  # as if the device had too little memory once
        compute = base.compute_features
        patch.setattr(base, "compute_features", lambda *args, **options: (
            options["say"]("half as many images at once"), compute(*args, **options))[1])
        passes["replaced"] = stream.run()
    passes["after"] = stream.run()
    return stream, passes


def test_a_dry_run_says_and_changes_nothing(life):
    stream, passes = life
    assert [line.split(" (")[0] for line in passes["dry"].would] == ["learn a", "learn b"]
    assert {each["task"] for each in passes["dry"].rejected} == {"copy", "bad name"}
    assert stream.after_dry == ["inbox"]


def test_the_first_pass_founds_the_stream(life):
    _, passes = life
    done = passes["founding"]
    assert [each["slot"] for each in done.learned] == ["a", "b"]
    assert all(each["decision"]["passed"] for each in done.learned)
    assert (done.exit_code, done.champion) == (0, 2)
    fields = json.loads(json.dumps(done.fields()))
    assert fields["learned"][1]["seconds"].keys() == {"features", "train", "evaluate"}
    assert min(fields["learned"][1]["added_bytes"].values()) > 0


def test_what_is_unfit_stays_and_is_told_why(life):
    stream, passes = life
    found = {each["task"]: each["codes"] for each in passes["founding"].rejected}
    assert found == {"copy": ["duplicate"], "bad name": ["name"]}
    said = json.loads((stream.inbox / "copy" / "_REJECTED.json").read_text())
    assert "those of task 'a'" in said["reasons"][0]
    assert (stream.inbox / "copy" / "train").is_dir()


def test_a_pass_without_news_does_nothing(life):
    _, passes = life
    assert passes["again"].did_nothing
    assert passes["again"].exit_code == 0
    assert passes["again"].lines()[-1] == "digits: nothing to do"
    assert "learn" not in passes["again"].seconds


def test_the_gate_stops_a_poisoned_task_and_the_one_behind_is_learned_without_it(life):
    stream, passes = life
    done = passes["repaired"]
    assert any("poison was learned" in text for text in done.repaired)
    assert [each["slot"] for each in done.learned] == ["c"]
    versions = {version.task: version for version in stream.versions()
                if version.tags["prefix"]}
    assert versions["poison"].tags["gate"] == "failed"
    assert "challenger" in versions["poison"].aliases
    decided = {each.slot: each for each in Journal(stream.storage, "digits").decided()}
    assert not decided["poison"].passed
    assert "above chance" in decided["poison"].decision["reasons"][0]
    assert decided["c"].parent == decided["b"].prefix


def test_nothing_is_tried_twice(life):
    stream, passes = life
    assert passes["not again"].did_nothing
    assert sorted(passes["not again"].skipped) == ["bad name (rejected)", "copy (rejected)",
                                                   "poison (stopped; learned again when a "
                                                   "file, the policy or the options of training "
                                                   "change)"]
    tasks = [(version.task, version.task_index) for version in stream.versions()]
    assert tasks == [("a", 0), ("b", 1), ("poison", 2), ("c", 2), ("a", 2), ("b", 3)]


def test_a_stopped_task_is_learned_again_with_other_options_of_training(life, tmp_path,
                                                                        monkeypatch):
    stream, _ = life
    other, values = tmp_path / "other.yaml", CONFIG.to_dict()
    values["train"] |= {"learning_rate": 0.5 * CONFIG.train.learning_rate}
    other.write_text(yaml.safe_dump(values))

    def learned_by(path):
        done = stream.run(dry_run=True, config=str(path))
        return [line.split(" (")[0] for line in done.would]

    assert learned_by(stream.root / "config.yaml") == []
    assert learned_by(other) == ["learn poison"]
    decided = Journal.decided
    monkeypatch.setattr(Journal, "decided", lambda journal: [
        dataclasses.replace(each, training="") for each in decided(journal)])  # an older release
    assert learned_by(other) == []


def test_passes_learn_what_one_run_learns(life, tmp_path):
    """Two passes, one that died and one that was relearned: the weights of one process at once."""
    stream = life[0]
    for task, labels in (("a", (0, 1)), ("b", (2, 3)), ("c", (6, 7))):
        put_task(tmp_path / "tasks", task, labels)
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data,
                                                                  data=str(tmp_path / "tasks")))
    model = run_stream(config, tmp_path / "oracle").model
    assert model.weights_hash() == stream.learned["c"]


def test_after_a_rollback_the_report_is_of_what_is_champion(life):
    _, passes = life
    assert passes["rolled back"].learned == []
    assert passes["rolled back"].champion == 2
    assert "report" in passes["rolled back"].seconds
    assert any(text.startswith("c (decided; version 4 has it and the champion does not: `partialhn "
                               "models promote") for text in passes["rolled back"].skipped)


def test_more_data_of_a_task_makes_a_slot_on_top_of_the_champion(life):
    stream, passes = life
    [new] = passes["refresh"].learned
    assert (new["slot"], new["decision"]["passed"]) == ("a/2026-11", True)
    rows = {row["task"]: row for row in new["decision"]["tasks"]}
    assert rows.keys() == {"a", "b"}
    assert rows["a"]["before"] is not None  # the old slot, on the test images of both
    predictor, version = stream.registry.load_predictor("models:/digits@champion")
    assert predictor.tasks == ["a", "b"]
    assert predictor.task_index("a") == 2
    shown = [line.split()[:2] for line in show("digits", str(stream.root / "store")).splitlines()
             if line[:1].isdigit()]
    assert shown == [["0", "a"], ["1", "b"]], "the numbers that predict --task takes"
    assert [v.task for v in stream.versions() if "task-a" in v.aliases] == ["a"]
    result = stream.registry.result("digits")
    assert [task["name"] for task in result["tasks"]] == ["a", "b", "a/2026-11", "b/=2026-12"]
    assert result["weights_hash"] == version.tags["weights_hash"]
    assert result["policy"]["min_above_chance"] == 0.3, "that of the stream's passes"
    assert [each["task"] for each in result["review"]] == ["a/2026-11", "b/=2026-12"]
    assert all(each["examples"] for each in result["review"]), "from the stored samples"


def test_a_task_counts_once_by_its_newest_slot_and_on_the_images_it_was_tested_on(life):
    stream, passes = life
    [new] = passes["refresh"].learned
    assert any("p-value of guessing (48 test images)" in check
               for check in new["decision"]["checks"]), "24 of each of the two slots"
    result = stream.registry.result("digits")
    rows = result["accuracy_matrix"]
    refresh, replacement = stream.versions()[-2:]
    assert float(refresh.tags["acc"]) == pytest.approx((rows[2][1] + rows[2][2]) / 2)
    for found in (float(replacement.tags["acc"]), result["acc"],
                  result["without_task_id"]["acc_given"]):
        assert found == pytest.approx((rows[3][2] + rows[3][3]) / 2)


def test_what_is_sent_again_is_not_used_and_said(life):
    _, passes = life
    done = passes["sent again"]
    assert done.did_nothing
    assert [text.split(":")[0] for text in done.not_used] == ["b"]
    assert any(line.startswith("not used: b: its files are not those") for line in done.lines())
    assert done.fields()["not_used"] == done.not_used


def test_a_part_that_replaces_its_task_is_learned_alone_with_its_own_classes(life):
    stream, passes = life
    [new] = passes["replaced"].learned
    assert (new["slot"], new["decision"]["passed"]) == ("b/=2026-12", True)
    rows = {row["task"]: row for row in new["decision"]["tasks"]}
    assert (rows["b"]["before"], rows["a"]["before"] is None) == (None, False)
    predictor = stream.registry.load_predictor("models:/digits@champion")[0]
    assert predictor.tasks == ["a", "b"]
    assert predictor.model.tasks[predictor.task_index("b")].classes == ("2", "8")
    result = stream.registry.result("digits")
    assert result["tasks"][-1]["test_images"] == 24, "the test images of the new part alone"
    assert passes["after"].did_nothing


def test_what_a_pass_noted_is_in_its_outcome_and_in_the_result(life):
    stream, passes = life
    assert passes["replaced"].fields()["notes"] == ["half as many images at once"]
    assert passes["refresh"].notes == []
    assert stream.registry.result("digits")["notes"] == ["half as many images at once"]


def test_the_history_tells_the_whole_life(life):
    entries = [entry for entry in life[0].registry.aliases.history("digits").entries()
               if entry.move.alias in ("champion", "challenger")]
    assert [(e.move.alias, e.move.kind, e.move.to) for e in entries] == [
        ("champion", "trained", 1), ("champion", "trained", 2), ("challenger", "gate-rejected", 3),
        ("champion", "trained", 4), ("champion", "rollback", 2), ("champion", "refresh", 5),
        ("champion", "refresh", 6)]
    assert all(entry.move.token for entry in entries if entry.move.kind != "rollback")


def test_a_stream_keeps_what_it_was_founded_with(life, tmp_path):
    other = CONFIG.to_dict() | {"backbone": CONFIG.to_dict()["backbone"] | {"freeze_depth": 2}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(InputError, match=r"backbone.freeze_depth is 2.*started with 3"):
        life[0].run(config=str(tmp_path / "other.yaml"))


# An arrival whose training diverges ------------------------------------------------------------

HOT = small_config(train={"epochs": None, "learning_rate": 1e30, "min_steps": 20, "max_steps": 20})
"""Tasks with few images are solved; one with many is trained, and diverges."""


@pytest.fixture
def hot(tmp_path):
    """Tasks a and c with few images, and between them b with many."""
    stream = Stream(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(HOT.to_dict()))
    for task, labels, images in (("a", (0, 1), 40), ("b", (2, 3), 150), ("c", (6, 7), 40)):
        put_task(stream.inbox, task, labels, rows=range(images))
    return stream


def test_an_arrival_that_diverges_is_rejected_and_the_others_are_learned(hot):
    done = hot.run()
    assert [(each["task"], each["codes"]) for each in done.rejected] == [("b", ["diverged"])]
    assert "the loss of task 'b' became " in done.rejected[0]["reasons"][0]
    assert [each["slot"] for each in done.learned] == ["a", "c"]
    assert (done.champion, done.exit_code) == (2, 0)
    result = hot.registry.result("digits")
    assert result["config"]["data"]["data"] == "inbox", "not the option's default"
    assert result["images_decoded"] == done.images_decoded == 2 * (40 + 150 + 40)
    assert "The last pass took" in render(result)
    said = json.loads((hot.inbox / "b" / "_REJECTED.json").read_text())
    assert "smaller learning_rate" in said["what_to_do"]
    again = hot.run()
    assert again.did_nothing
    assert "b (rejected)" in again.skipped
    train = HOT.to_dict()["train"] | {"learning_rate": 0.01}
    (hot.root / "cooler.yaml").write_text(yaml.safe_dump(HOT.to_dict() | {"train": train}))
    cooler = hot.run(config=str(hot.root / "cooler.yaml"))
    assert [each["slot"] for each in cooler.learned] == ["b"]
    assert not (hot.inbox / "b" / "_REJECTED.json").exists()


@pytest.mark.parametrize("tasks_at_once", [1, 2])
def test_a_refresh_of_what_diverged_waits_for_it(tmp_path, tasks_at_once):
    stream = Stream(tmp_path)
    compute = HOT.to_dict()["compute"] | {"tasks_at_once": tasks_at_once}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(HOT.to_dict() | {"compute": compute}))
    put_task(stream.inbox, "b", (2, 3), rows=range(150))
    put_task(stream.inbox, "b/more", (2, 3), rows=range(150, 170))
    put_task(stream.inbox, "c", (6, 7), rows=range(40))
    done = stream.run()
    assert [each["task"] for each in done.rejected] == ["b"]
    assert [each["slot"] for each in done.learned] == ["c"]
    assert any(text.startswith("b/more") for text in stream.run().waiting)


# Two at the same second -----------------------------------------------------------------------


def test_a_version_is_loaded_by_mlflow_alone_from_its_place_and_from_elsewhere(life, tmp_path):
    """Its tensors lie beside it, and the place is known where it was copied away."""
    import mlflow.pyfunc
    import pandas as pd

    stream, _ = life
    registry, version = stream.registry, stream.versions()[-1]
    source = Path(registry.source_of(version))
    assert not list(source.rglob("model.safetensors"))
    task, image = version.task, put_png(0)
    expected = registry.load_predictor(version.uri)[0].predict([image], task)
    shutil.copytree(source, tmp_path / "copy")
    for folder in (source, tmp_path / "copy"):
        loaded = mlflow.pyfunc.load_model(str(folder))
        rows = loaded.predict(pd.DataFrame({"image": [image], "task": [task]}))
        assert rows["label"].tolist() == expected.labels
    assert not list(source.rglob("model.safetensors")), "loading leaves a version as it is"


def test_damaged_shared_tensors_are_noticed_and_repaired(life):
    stream, _ = life
    registry, version = stream.registry, stream.versions()[-1]
    objects = Path(registry.shared_place(version)) / "objects"
    newest = max(objects.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    content = newest.read_bytes()
    for damage in (content[:-1], None):
        newest.unlink()
        if damage is not None:
            newest.write_bytes(damage)
        with pytest.raises(IntegrityError, match=r"is damaged: the shared tensors \w+\.\.\. are"):
            registry.require_sound(version)
        assert [check.passed for check in verify(registry, version)] == [False]
        lines = repaired(registry, stream.storage, "digits", str(version.version))["repaired"]
        assert lines == [f"{version.uri}: {newest.name} was written again"]
        assert newest.read_bytes() == content


def test_a_chapter_holds_what_the_files_of_its_tasks_hold(life):
    stream, _ = life
    storage, stored = stream.storage, chapters.Chapters(stream.storage, "digits")
    champion = stream.registry.holder("digits", "champion")
    tasks = chain_to(Journal(storage, "digits").decided(), champion.tags["prefix"])
    whole = tasks[:len(tasks) // 2 * 2]
    store, seen, files = open_store(storage), Seen(), Seen()
    stored.recall(tasks, seen)
    assert list(seen.learned) == [task.prefix for task in whole]
    lineage.find(storage.filesystem, storage.path("runs", "digits", "learned"),
                 list(seen.learned), files.learned)
    assert seen.learned == files.learned
    assert list(seen.slots.values()) == slots_of(whole, store)
    hashes = {fingerprint: hashes_N.tolist() for fingerprint, hashes_N in seen.hashes.items()}
    hashes_of(storage, "digits", whole, files)
    assert hashes == {key: hashes_N.tolist() for key, hashes_N in files.hashes.items()}


DAMAGE = {
    "chapter cut off": lambda content: content[:-9],
    "no text": lambda content: b"\xff" + content,
    "another number": lambda content: content.replace(b'"train_seconds": ', b'"train_seconds": 1'),
    "another type": lambda content: content.replace(b'"record": {', b'"record": [{', 1).replace(
        b"}, \"task_bytes", b"}], \"task_bytes", 1)}


@pytest.mark.parametrize("change", ["touched", "gone", *DAMAGE])
def test_a_chapter_counts_only_while_its_files_are_as_they_were(life, change):
    stream, _ = life
    storage = stream.storage
    champion = stream.registry.holder("digits", "champion")
    tasks = chain_to(Journal(storage, "digits").decided(), champion.tags["prefix"])
    file = Path(storage.path("runs", "digits", "learned", tasks[0].prefix, "model.json"))
    if change in DAMAGE:
        file = Path(storage.path("streams", "digits", "chapters", f"{tasks[1].prefix}.json"))
    content, state = file.read_bytes(), file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    if change == "gone":
        file.unlink()
    elif change in DAMAGE:
        file.write_bytes(DAMAGE[change](content))
        assert file.read_bytes() != content
    seen = Seen()
    chapters.Chapters(storage, "digits").recall(tasks, seen)
    file.write_bytes(content)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert tasks[1].prefix not in seen.learned
    assert tasks[3].prefix in seen.learned


def test_pruning_leaves_what_is_needed_and_the_stream_goes_on(life):
    stream, _ = life
    registry, before = stream.registry, stream.versions()
    champion = registry.holder("digits", "champion")
    chosen = choose(registry, stream.storage, "digits", 1, keep_aliases=True)
    assert all(not version.aliases for version in chosen)
    chosen = choose(registry, stream.storage, "digits", 1, keep_aliases=False)
    assert chosen
    assert stream.versions() == before, "choosing deletes nothing"
    with Lease(stream.storage, "digits") as lease:
        assert lease.acquire() is None
        with pytest.raises(InputError, match="is in use by"):
            list(prune(registry, stream.storage, "digits", chosen))
    orphan = Path(registry.shared_place(champion)) / "objects" / f"{'0' * 64}.safetensors"
    orphan.write_bytes(b"of a pass that was killed before it registered the version")
    first = prune(registry, stream.storage, "digits", chosen)
    next(first)
    first.close()  # as if it was killed
    chosen = choose(registry, stream.storage, "digits", 1, keep_aliases=False)
    list(prune(registry, stream.storage, "digits", chosen))
    assert not orphan.exists()
    left = stream.versions()
    assert {version.version for version in before} - {version.version for version in left}
    assert registry.holder("digits", "champion") == champion
    for version in left:
        registry.require_sound(version)
    assert not stream.registry.aliases.differences("digits")
    assert stream.run().did_nothing, "what was pruned is not registered again"
    put_task(stream.inbox, "later", (4, 9), rows=range(60))
    learned = stream.run()
    assert [task["slot"] for task in learned.learned] == ["later"]
    registry.require_sound(stream.versions()[-1])


def start(stream: Stream) -> Forked:
    return partialhn("retrain", "--name", "digits", "--storage", stream.root / "store", "--config",
                     stream.root / "config.yaml", "--policy", stream.root / "lenient.yaml",
                     "--json", cwd=stream.root)


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.timeout(3600)
def test_two_passes_at_the_same_second(tmp_path, rounds):
    stream, labels = Stream(tmp_path), [(i, j) for i in range(10) for j in range(i + 1, 10)]
    (tmp_path / "lenient.yaml").write_text("min_above_chance: null\n")
    for number in range(rounds):
        put_task(stream.inbox, f"t{number}", labels[number], range(8 * number, 8 * number + 8))
        processes = [start(stream) for _ in range(2)]
        ends = [process.wait(900) for process in processes]
        assert [ended.returncode for ended in ends] == [0, 0], ends
        found = [json.loads(ended.stdout) for ended in ends]
        learned = [each["slot"] for one in found for each in one["learned"]]
        assert learned == [f"t{number}"], found
        assert sum(bool(one["held_by"]) or one["nothing_to_do"] for one in found) == 1
    assert [version.task for version in stream.versions()] == [f"t{n}" for n in range(rounds)]
