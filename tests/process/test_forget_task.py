"""A task is forgotten: the new version, its messages, the passes after it, and a rollback."""

import dataclasses
import json
import shutil

import pytest

from partialhn.data.datasets import open_stream
from partialhn.errors import InputError
from partialhn.evaluation.answer_sample import check_sample, read_sample
from pipelines.cli.main import run
from pipelines.execution.continuation import compare, learned_before
from pipelines.platform.storage import open_storage
from pipelines.registry.models import promote, roll_back
from pipelines.registry.package import artifact
from pipelines.retrain.forget import forget_task
from pipelines.retrain.journal import Journal, chain_to
from pipelines.show import show
from tests.process.test_retrain import CONFIG, Stream, put_task

WHY = "the camera was replaced"


@pytest.fixture(scope="module")
def forgotten(module_without_ray, tmp_path_factory):
    """Three tasks, of which the middle one is forgotten; then a pass, and one that learns it."""
    stream, seen = Stream(tmp_path_factory.mktemp("forget")), {}
    for task, labels in (("a", (0, 1)), ("b", (2, 3)), ("c", (6, 7))):
        put_task(stream.inbox, task, labels)
    stream.run()
    settings = stream.settings()
    before, _ = stream.registry.load_predictor("models:/digits@champion")
    with pytest.raises(InputError, match="task is 'x'; allowed: a, b, c"):
        forget_task(settings, "x", "", lambda line: None)
    seen["look"] = forget_task(dataclasses.replace(settings, dry_run=True), "b", WHY,
                               lambda line: None)
    seen["versions before"] = len(stream.versions())
    seen["forgot"] = forget_task(settings, "b", WHY, lambda line: None)
    seen["predictors"] = before, stream.registry.load_predictor("models:/digits@champion")[0]
    seen["shown"] = show("digits", str(stream.root / "store"))
    seen["result"] = stream.registry.result("digits")
    put_task(stream.inbox, "d", (4, 5))
    seen["pass"] = stream.run()
    seen["later"] = stream.registry.load_predictor("models:/digits@champion")[0]
    return stream, seen


def test_a_dry_run_says_what_goes_and_what_stays(forgotten):
    _, seen = forgotten
    assert seen["look"].would == ["make a version without task 'b', with a, c",
                                  "store 1 models once more without it"]
    assert seen["versions before"] == 3


def test_a_stream_that_does_not_exist_is_said_and_leaves_nothing(forgotten):
    stream, _ = forgotten
    settings = dataclasses.replace(stream.settings(), name="digit")
    with pytest.raises(InputError, match="stream is 'digit', which is not in the registry"):
        forget_task(settings, "a", WHY, lambda line: None)
    assert not (stream.root / "store" / "streams" / "digit").exists()


def test_the_version_passes_the_gate_and_answers_the_others_as_before(forgotten, tmp_path):
    stream, seen = forgotten
    [done] = seen["forgot"].learned
    assert (done["version"], done["decision"]["passed"], done["stays"]) == (4, True, [])
    assert "forgot b: models:/digits/4 is champion" in seen["forgot"].lines()
    assert [row["task"] for row in done["decision"]["tasks"]] == ["a", "c"]
    before, after = seen["predictors"]
    assert after.tasks == ["a", "c"]
    image = (stream.inbox / "c" / "test" / "6" / "6-000.png").read_bytes()
    assert (before.predict([image], "c").probabilities_BK
            == after.predict([image], "c").probabilities_BK).all()
    with pytest.raises(InputError, match=rf"has forgotten on .* \({WHY}\); allowed: a, c"):
        after.check_task("b")
    copy = stream.registry.download_sound(stream.versions()[3], tmp_path)
    sample = read_sample(artifact(copy, "sample"))
    assert set(sample["task"].to_pylist()) == {"c"}
    assert check_sample(sample, lambda images, task: (
        (answers := after.predict(images, task)).labels,
        list(answers.probabilities_BK.max(1)))).passed


def test_it_is_said_wherever_the_stream_is_shown(forgotten):
    stream, seen = forgotten
    assert "task 'b' was forgotten" in seen["shown"]
    rows = [line.split()[:2] for line in seen["shown"].splitlines()
            if line[:1].isdigit()]
    assert rows == [["0", "a"], ["1", "c"]]
    assert [task["name"] for task in seen["result"]["tasks"]] == ["a", "c"]
    assert [gone["why"] for gone in seen["result"]["forgotten"]] == [WHY]
    history = [(entry.move.alias, entry.move.kind, entry.move.to)
               for entry in stream.registry.aliases.history("digits").entries()]
    assert {("champion", "forgot", 4), ("task-c", "forgot", 4), ("task-b", "forgot", None)} <= set(
        history)


def test_the_next_pass_goes_on_without_it_and_does_not_learn_it_again(forgotten):
    stream, seen = forgotten
    assert [each["slot"] for each in seen["pass"].learned] == ["d"]
    assert [text.split(":")[0] for text in seen["pass"].forgotten] == ["b"]
    assert any("--learn-again b" in line for line in seen["pass"].lines())
    assert seen["later"].tasks == ["a", "c", "d"]
    with pytest.raises(InputError, match="has forgotten"):
        seen["later"].check_task("b")
    journal = Journal(stream.storage, "digits").decided()
    chain = chain_to(journal, seen["pass"].learned[0]["prefix"])
    assert [task.slot for task in chain] == ["a", "c", "d"]


@pytest.mark.parametrize("dry_run", [False, True])
def test_only_what_is_forgotten_is_learned_again(forgotten, tmp_path, dry_run):
    stream, _ = forgotten
    before = len(stream.versions())
    (stream.inbox / "b").rename(tmp_path / "b")
    done = stream.run(learn_again=("a", "b"), dry_run=dry_run)
    (tmp_path / "b").rename(stream.inbox / "b")
    assert done.waiting == ["b: is to be learned again, but there is no folder inbox/b"]
    put_task(stream.inbox, "new", (8, 9))
    with pytest.raises(InputError, match="names 'new', which was neither forgotten nor rolled "
                                         r"back; allowed: b\Z"):
        stream.run(learn_again=("b", "new"), dry_run=dry_run)
    shutil.rmtree(stream.inbox / "new")
    assert len(stream.versions()) == before


def test_a_rollback_brings_it_back_and_it_can_be_learned_again(forgotten, capsys):
    stream, _ = forgotten
    storage = str(stream.root / "store")
    assert run(["models", "show", "--name", "digits", "--storage", storage]) == 0
    assert "task 'b' was forgotten" in capsys.readouterr().out
    again = stream.run(learn_again=("b",))
    assert [each["slot"] for each in again.learned] == ["b"]
    predictor, version = stream.registry.load_predictor("models:/digits@champion")
    assert (predictor.tasks, version.forgotten) == (["a", "c", "d", "b"], ())
    repeated = stream.run(learn_again=("b",))
    assert (repeated.forgotten, repeated.learned) == ([], [])
    with pytest.raises(InputError, match="allowed: no name, because the champion lacks no"):
        stream.run(learn_again=("x",))
    roll_back(stream.registry, "digits", "4", "")
    assert stream.run().learned == []
    roll_back(stream.registry, "digits", "3", "")
    predictor = stream.registry.load_predictor("models:/digits@champion")[0]
    assert predictor.tasks == ["a", "b", "c"]
    assert "--learn-again d learns it on top of the champion)" in stream.run().skipped[0]
    assert [each["slot"] for each in stream.run(learn_again=("d",)).learned] == ["d"]
    predictor = stream.registry.load_predictor("models:/digits@champion")[0]
    assert predictor.tasks == ["a", "b", "c", "d"]
    roll_back(stream.registry, "digits", "3", "")
    [skipped] = stream.run(learn_again=("d",)).skipped
    assert skipped == ("d (decided; version 7 has it and the champion does not: `partialhn models "
                       "promote --name digits --version 7` makes that version champion)")
    promote(stream.registry, "digits", "7", "", force=False)
    assert stream.run(learn_again=("d",)).did_nothing
    roll_back(stream.registry, "digits", "3", "")
    with pytest.raises(InputError, match="task is ''"):
        forget_task(stream.settings(), "", "", lambda line: None)
    assert json.loads(json.dumps(again.fields()))["forgotten"] == []


def test_the_first_task_leaves_what_the_others_need(forgotten, tmp_path):
    stream, _ = forgotten
    done = forget_task(stream.settings(), "a", "", lambda line: None)
    assert ["trunk" in text for text in done.learned[0]["stays"]] == [True, False]
    assert stream.registry.load_predictor("models:/digits@champion")[0].tasks[0] != "a"
    before = learned_before(stream.registry, open_storage(str(stream.root / "store")), "digits")
    assert before.champion is not None
    assert [gone.task for gone in before.champion.forgotten][-1] == "a"
    for task in ("a", "b", "c"):
        shutil.copytree(stream.inbox / task, tmp_path / "tasks" / task)
    data = dataclasses.replace(CONFIG.data, data=str(tmp_path / "tasks"))
    found = compare(before, CONFIG, before.ordered(open_stream(data, tmp_path / "sets")), None)
    assert any(line.startswith("task 'a' comes back: task 'a' was forgotten on ")
               for line in found.lines())
    with pytest.raises(InputError, match="does not continue"):
        found.check(replace=False)
    shutil.rmtree(tmp_path / "tasks" / "a")
    found = compare(before, CONFIG, before.ordered(open_stream(data, tmp_path / "sets")), None)
    assert {*found.again.values()} == {"its model has forgotten 'a', and train does not go on from "
                                       "such a model; `partialhn retrain` does"}
    assert stream.run().exit_code == 0


@pytest.mark.parametrize("go_back", [
    lambda registry, version: promote(registry, "digits", version, "", force=False),
    lambda registry, version: roll_back(registry, "digits", version, "")], ids=["promote", "back"])
def test_aliases_come_back_with_a_version_that_knows_their_tasks(forgotten, go_back):
    stream, _ = forgotten
    go_back(stream.registry, "3")
    for task in ("a", "b"):
        forget_task(stream.settings(), task, "", lambda line: None)

    def aliases():
        return {alias for version in stream.versions() for alias in version.aliases}
    assert not {"task-a", "task-b"} & aliases()
    go_back(stream.registry, "1")
    assert {"task-a", "task-b"} & aliases() == {"task-a"}
    go_back(stream.registry, "3")
    assert {"task-a", "task-b"} <= aliases()
