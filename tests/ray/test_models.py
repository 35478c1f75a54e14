"""`partialhn models` against a real MLflow on SQLite, and what crashes and bad hands leave."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from partialhn.errors import InputError, IntegrityError
from pipelines.doctor import check_champion
from pipelines.gate import GateFacts, Policy, decide
from pipelines.label_images import predict_to_parquet
from pipelines.platform.storage import open_storage
from pipelines.registry.client import Placing, connect
from pipelines.registry.history import Move, StaleTokenError
from pipelines.show import show

FACTS = GateFacts("four-five", 2, {"zero-one": 0.4, "two-three": 0.9, "four-five": 0.9},
                  {"zero-one": 0.9, "two-three": 0.9}, images=50)
REFUSED = decide(Policy(), FACTS)
REASON = "task 'zero-one': 0.900 -> 0.400, loss 0.500, allowed at most 0.02"


@pytest.fixture
def registry(tmp_path, monkeypatch, empty_registry):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    empty_registry(tmp_path / "store")
    return connect(open_storage(str(tmp_path / "store")))


@pytest.fixture
def three(registry, digit_tasks):
    """Two tasks that passed, and a third that the gate refused."""
    for index in (0, 1):
        digit_tasks.register(registry, "digits", index)
    digit_tasks.register(registry, "digits", 2, refused())
    return registry


def refused(**more):
    return Placing(False, "gate-rejected", REASON, decision=REFUSED.fields(), **more)


def aliases_of(registry):
    return {alias: version.version for version in registry.versions("digits")
            for alias in version.aliases}


def kinds(registry):
    return [(entry.move.kind, entry.move.alias, entry.origin, entry.move.to)
            for entry in registry.aliases.history("digits").entries()]


@pytest.fixture
def models(command, three, tmp_path):
    """`partialhn models WORD` on the stream."""
    return lambda *words: command("models", *words, "--name", "digits", "--storage",
                                  tmp_path / "store")


TRAINED = [("trained", "task-zero-one", None, 1), ("trained", "champion", None, 1),
           ("trained", "task-two-three", None, 2), ("trained", "champion", 1, 2)]


def test_a_refused_version_is_challenger_and_says_why(three):
    assert aliases_of(three) == {"task-zero-one": 1, "task-two-three": 2, "champion": 2,
                                 "challenger": 3}
    assert kinds(three) == [*TRAINED, ("gate-rejected", "challenger", None, 3)]
    version = three.resolve("models:/digits@challenger")
    assert version.tags["gate"] == "failed"
    assert version.decision == REFUSED.fields()
    entry = three.aliases.history("digits").entries()[-1]
    assert entry.move.decision == REFUSED.fields()
    assert entry.move.metrics["acc"] == pytest.approx(0.88)
    text = show("digits", str(three._storage.root))
    assert "refused  version 3 (task 'four-five') is challenger only:" in text
    assert REASON in text


def test_a_task_keeps_its_number_when_the_versions_before_it_are_deleted(three):
    """The champion's own files say it: some of the deleted may have refreshed the same task."""
    three._client.delete_model_version("digits", "1")
    storage = str(three._storage.root)
    champion = three.resolve("models:/digits@champion")
    assert three.slots_of(champion) == ["zero-one", "two-three"]
    text = show("digits", storage)
    assert [line.split()[:2] for line in text.splitlines()
            if line[:1].isdigit()] == [["1", "two-three"], ["1", "more"]]
    assert "1 more of the champion's tasks are not listed" in text
    shutil.rmtree(three.source_of(champion).removeprefix("file://"))
    assert "the tasks have no numbers here" in show("digits", storage)


def test_the_tables_say_what_the_client_says(three):
    from mlflow import MlflowClient

    from pipelines.registry.reading import ClientReader, SqliteReader

    three._client.delete_model_version("digits", "1")
    three._client.create_registered_model("another")
    tables, client = three._connection.reader, ClientReader(three._client)
    assert isinstance(tables, SqliteReader)
    assert isinstance(three._client, MlflowClient)
    assert tables.models() == client.models()
    assert tables.model("no such model") is client.model("no such model") is None
    found = tables.versions("digits")
    assert found == client.versions("digits")
    assert [version.version for version in found] == [2, 3]
    lineage_id = found[1].tags["prefix"]
    assert tables.versions("digits", lineage_id) == client.versions("digits", lineage_id)
    assert tables.versions("digits", "no such id") == []
    for number in (1, 2, 3, 4):
        assert tables.version("digits", number) == client.version("digits", number)
    assert tables.source(found[0]) == client.source(found[0])
    run = found[0].run_id
    assert tables.parent_run(run) == client.parent_run(run)
    assert tables.artifacts_of(run) == client.artifacts_of(run)


def test_reading_imports_neither_mlflow_nor_torch(three, tmp_path):
    program = ("import sys; from pipelines.cli.main import run; "
               "assert run(sys.argv[1:]) == 0; "
               "assert not {'mlflow', 'torch', 'sqlalchemy'} & sys.modules.keys()")
    for words in (["models", "list"], ["models", "show"], ["models", "history"], ["show"]):
        done = subprocess.run([sys.executable, "-c", program, *words, "--name", "digits",
                               "--storage", str(tmp_path / "store")], capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr


def test_registering_again_writes_nothing_new(three, digit_tasks):
    before = kinds(three)
    for index in (0, 1):
        digit_tasks.register(three, "digits", index)
    digit_tasks.register(three, "digits", 2, refused())
    assert kinds(three) == before
    assert len(three.versions("digits")) == 3


def test_the_report_names_the_challenger(three):
    run = three._client.get_run(three.resolve("models:/digits@champion").run_id)
    three.log_result(run.data.tags["mlflow.parentRunId"],
                     {"name": "digits", "accuracy_matrix": [[0.9]]})
    from pipelines.report.facts import read_facts
    from pipelines.report.verdict import verdict

    result = three.result("digits")
    assert result["challenger"]["version"] == 3
    cautions = verdict(read_facts(result)).cautions
    assert any("version, 3 (task “four-five”), was refused" in text and REASON in text
               for text in cautions)


def test_list_show_and_history(models):
    code, out, _ = models("list")
    assert code == 0
    assert "version 3 was refused: " + REASON in out
    assert "means over all tasks" in out
    code, out, _ = models("list", "--json")
    rows = json.loads(out)["versions"]
    assert [(row["version"], row["gate"]) for row in rows] == [(1, None), (2, None), (3, "failed")]
    code, out, _ = models("show", "--version", "challenger")
    assert code == 0
    for part in ("gate: failed", "zero-one", "loses too much", "gate-rejected"):
        assert part in out
    code, out, _ = models("history", "--json")
    assert [row["seq"] for row in json.loads(out)["entries"]] == [1, 2, 3, 4, 5]


def test_promoting_what_the_gate_refused_takes_force_and_a_reason(models, three):
    code, _, err = models("promote")
    assert code == 3
    assert REASON in err
    assert aliases_of(three)["champion"] == 2
    assert models("promote", "--force")[0] == 2
    out = models("promote", "--version", "1")[1]
    assert "\nit does not know these tasks, and version 2 does: two-three\nhistory entry" in out
    out = models("promote", "--version", "2")[1]
    assert "\nit knows these tasks, and version 1 does not: two-three\nhistory entry" in out
    code, out, _ = models("promote", "--force", "--why", "zero-one is no longer sold", "--json")
    assert code == 0
    assert json.loads(out)["champion"] == 3
    assert aliases_of(three) == {"task-zero-one": 1, "task-two-three": 2, "task-four-five": 3,
                                 "champion": 3, "challenger": 3}
    assert three.aliases.history("digits").entries()[-1].move.why == "zero-one is no longer sold"
    assert "refused  version" not in show("digits", str(three._storage.root))


def test_rollback_is_one_entry_and_stays_when_training_is_started_again(models, three,
                                                                        digit_tasks):
    code, out, _ = models("rollback", "--why", "complaints")
    assert (code, "champion is version 1" in out) == (0, True)
    assert "\nit does not know these tasks, and version 2 does: two-three\n" in out
    assert kinds(three)[5:] == [("rollback", "champion", 2, 1)]
    assert models("rollback")[0] == 2, "there is no champion before the first"
    digit_tasks.register(three, "digits", 1)
    assert aliases_of(three)["champion"] == 1
    code, out, _ = models("rollback", "--to", "2")
    assert (code, aliases_of(three)["champion"]) == (0, 2)
    code, _, err = models("rollback", "--to", "3")
    assert (code, "was never champion; allowed: 1, 2" in err) == (2, True)


@pytest.mark.parametrize("words", [["show", "--version", "9"], ["promote", "--version", "nope"],
                                   ["rollback", "--to", "9"], ["verify", "--version", "9"]])
def test_versions_that_are_not_there(models, words):
    code, _, err = models(*words)
    assert code == 2
    assert "versions: 1, 2, 3" in err


# Crashes -------------------------------------------------------------------------------------


def test_a_crash_between_history_and_alias_is_mended_once(three, models):
    history = three.aliases.history("digits")
    model = three._client.get_registered_model("digits")
    history.append(Move("champion", 1, "promoted", "then the power failed"),
                   str(model.creation_timestamp))
    assert aliases_of(three)["champion"] == 2
    for words in (["history"], ["list"], ["show"], ["verify"]):
        code, out, _ = models(*words)
        assert code == 0
        assert out.startswith("warning: alias champion points to version 2 in MLflow, and the "
                              "history says version 1; to set it: partialhn models repair"), words
        assert aliases_of(three)["champion"] == 2, "what only reads moves nothing"
    assert "warning: alias champion" in show("digits", str(three._storage.root))
    code, out, _ = models("repair")
    assert code == 0
    assert ("alias champion pointed to version 2; it was set to version 1 as in history entry 6 "
            "(promoted)") in out
    assert aliases_of(three)["champion"] == 1
    before = kinds(three)
    assert "pointed to" not in models("repair")[1]
    assert "warning" not in models("history")[1]
    assert kinds(three) == before


def test_a_rollback_that_was_interrupted_is_not_made_twice(three, models, digit_tasks):
    digit_tasks.register(three, "digits", 2, Placing(decision=REFUSED.fields() | {"passed": True}))
    model = three._client.get_registered_model("digits")
    three.aliases.history("digits").append(Move("champion", 2, "rollback", "killed here"),
                                           str(model.creation_timestamp))
    assert aliases_of(three)["champion"] == 3
    assert models("rollback")[0] == 0
    assert aliases_of(three)["champion"] == 2
    assert [kind for kind, *_ in kinds(three)].count("rollback") == 1


def test_an_alias_moved_behind_our_back_is_set_back_and_foreign_ones_stay(three):
    three._client.set_registered_model_alias("digits", "champion", "3")
    three._client.set_registered_model_alias("digits", "shop-window", "1")
    assert [repair.alias for repair in three.aliases.reconcile("digits")] == ["champion"]
    assert aliases_of(three) | {"shop-window": 1} == aliases_of(three)
    assert aliases_of(three)["champion"] == 2
    assert three.aliases.reconcile("digits") == []


def test_a_prediction_says_that_its_alias_was_moved_behind_our_back(three, digit_tasks, tmp_path):
    (tmp_path / "0.png").write_bytes(digit_tasks.experiences[0].test.take([0]).read()[0])
    lines = []
    for number in ("2", "3"):
        three._client.set_registered_model_alias("digits", "champion", number)
        predict_to_parquet("models:/digits@champion", "0", str(tmp_path / "0.png"),
                           str(tmp_path / "p.parquet"), str(tmp_path / "store"), log=lines.append)
    [line] = lines
    assert "alias champion points to version 3 in MLflow, and the history says version 2" in line


def test_streams_older_than_the_history_are_taken_over(three, tmp_path):
    before = aliases_of(three)
    shutil.rmtree(tmp_path / "store" / "history")
    again = connect(open_storage(str(tmp_path / "store")))
    assert {repair.entry.move.kind for repair in again.aliases.reconcile("digits")} == {"reconcile"}
    assert aliases_of(again) == before
    assert again.aliases.reconcile("digits") == []
    again.aliases.move("digits", Move("champion", 1, "promoted", ""))
    assert kinds(again)[-1] == ("promoted", "champion", 2, 1)


def test_a_deleted_version_takes_its_alias_along(three):
    three._client.delete_model_version("digits", "3")
    repairs = three.aliases.reconcile("digits")
    assert [str(repair) for repair in repairs] == [
        "alias challenger: version 3 is no longer in the registry (history entry 6)"]
    assert three.aliases.reconcile("digits") == []


def test_a_lost_lease_cannot_move_an_alias(three):
    three.aliases.move("digits", Move("champion", 1, "promoted", "", token=5))
    with pytest.raises(StaleTokenError, match=r"another process has taken over .* ours was 4"):
        three.aliases.move("digits", Move("champion", 2, "trained", "", token=4))
    assert aliases_of(three)["champion"] == 1


def test_a_storage_that_was_moved_is_not_called_damaged(three, tmp_path):
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = connect(open_storage(str(tmp_path / "moved")))
    words = rf"in the storage {tmp_path}/store, which is not there, .*ln -s {tmp_path}/moved"
    with pytest.raises(InputError, match=words):
        moved.load_predictor("models:/digits@champion")
    with pytest.raises(InputError, match=words):
        moved.aliases.history("digits")
    (tmp_path / "store").symlink_to(tmp_path / "moved")
    linked = connect(open_storage(str(tmp_path / "store")))
    assert linked.load_predictor("models:/digits@champion")[1].version == 2
    linked.aliases.move("digits", Move("champion", 1, "promoted", ""))
    assert aliases_of(linked)["champion"] == 1


def test_history_and_registry_belong_together(three, digit_tasks, tmp_path):
    elsewhere = connect(open_storage(str(tmp_path / "other")), three.tracking_uri)
    with pytest.raises(InputError, match=r"has its history in .*/store/history/digits, not in"):
        elsewhere.aliases.move("digits", Move("champion", 1, "promoted", ""))
    assert not elsewhere.aliases.keeps_history("digits")
    fresh = connect(open_storage(str(tmp_path / "store")), f"sqlite:///{tmp_path}/fresh.db")
    with pytest.raises(InputError, match="not in this registry; allowed: the --tracking-uri"):
        digit_tasks.register(fresh, "digits", 0)
    assert fresh.streams() == [], "what is refused leaves no empty model"


# Verification --------------------------------------------------------------------------------


def stored(three, version):
    return Path(three._client.get_model_version_download_uri("digits", version))


def test_verify_in_a_clean_process(models):
    code, out, err = models("verify", "--json")
    assert code == 0, (out, err)
    found = json.loads(out)
    assert [check["name"] for check in found["checks"]] == ["files", "weights", "signature",
                                                            "sample"]
    assert "on 128 images" in found["checks"][-1]["found"]


def test_verify_notices_every_changed_file_and_runs_none(models, three, tmp_path):
    folder = stored(three, "2")
    (folder / "planted.pkl").write_bytes(b"x")
    code, out, _ = models("verify")
    assert (code, "planted.pkl was added" in out) == (1, True)
    (folder / "planted.pkl").unlink()
    script = folder / "pyfunc_model.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + script.read_text())
    code, out, _ = models("verify")
    assert (code, "pyfunc_model.py was changed" in out) == (1, True)
    script.unlink()
    code, out, _ = models("verify")
    assert (code, "pyfunc_model.py is missing" in out) == (1, True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["truncated", "gone", "all gone", "sample"])
def test_no_alias_moves_to_a_damaged_version(three, models, tmp_path, damage):
    folder = stored(three, "1")
    model = next(folder.glob("artifacts/model-*/model.safetensors"))
    if damage == "truncated":
        model.write_bytes(model.read_bytes()[:1000])
    elif damage == "gone":
        model.unlink()
    elif damage == "all gone":
        shutil.rmtree(folder)
    else:
        next(folder.glob("artifacts/*.parquet")).write_bytes(b"")
    before = kinds(three), aliases_of(three)
    for words in (["rollback"], ["promote", "--version", "1"]):
        code, _, err = models(*words)
        assert code == 1
        assert err.startswith("error: models:/digits/1 (task 'zero-one') is damaged: "), err
        assert "models repair --name digits --version 1" in err
        assert "Traceback" not in err
        assert (kinds(three), aliases_of(three)) == before
    with pytest.raises(IntegrityError, match=r"models:/digits/1 .* is damaged"):
        three.load_predictor("models:/digits/1")
    champion = check_champion(open_storage(str(tmp_path / "store")), None, "digits")
    assert champion.passed, "another version is damaged"
    three.aliases.move("digits", Move("champion", 1, "promoted", ""))
    champion = check_champion(open_storage(str(tmp_path / "store")), None, "digits")
    assert (champion.passed, "is damaged" in champion.found) == (False, True)


def test_a_version_is_repaired_from_what_was_learned(three, models, digit_tasks, tmp_path):
    folder, version = stored(three, "2"), three.resolve("models:/digits/2")
    learned = tmp_path / "store" / "runs" / "digits" / "learned" / version.tags["prefix"]
    model = next(folder.glob("artifacts/model-*/model.safetensors"))
    model.write_bytes(model.read_bytes()[:1000])
    (folder / "pyfunc_model.py").unlink()
    code, _, err = models("repair")
    assert code == 1
    assert "cannot be repaired: artifacts/model-2/model.safetensors is damaged" in err
    assert not (folder / "pyfunc_model.py").exists(), "all of it or nothing"
    shutil.copytree(digit_tasks.folder / "model-2", learned)
    (folder / "planted.txt").write_text("x")
    code, out, _ = models("repair")
    assert (code, out.count("was written again"), out.count("was deleted")) == (0, 2, 1)
    three.require_sound(version)
    assert models("rollback")[0] == 0, "version 1 was never damaged"


@pytest.mark.slow
def test_verify_notices_other_weights_and_other_answers(three, models, digit_tasks):
    """Where someone could change the registry's hashes of files too."""
    from pipelines.registry.package import file_hashes

    folder = stored(three, "2")
    saved = next(folder.glob("artifacts/model-*"))
    for name in ("model.safetensors", "model.json"):  # a sound model, but with one task less
        (saved / name).write_bytes((digit_tasks.folder / "model-1" / name).read_bytes())
    three._client.set_model_version_tag("digits", "2", "files_sha256",
                                        json.dumps(file_hashes(folder)))
    code, out, _ = models("verify", "--json")
    assert code == 1
    checks = {check["name"]: check["passed"] for check in json.loads(out)["checks"]}
    assert checks["files"]
    assert not checks.get("weights", checks.get("loads"))


def test_a_planted_pickle_does_not_run(three, models, tmp_path):
    """A pickled model under the same name, its hash put right: loading refuses to unpickle it."""
    from pipelines.registry.package import file_hashes

    folder = stored(three, "2")
    mark = tmp_path / "ran"
    code = ("import pickle, sys\nclass Evil:\n def __reduce__(self):\n"
            f"  return (open, ({str(mark)!r}, 'w'))\n"
            "open(sys.argv[1], 'wb').write(pickle.dumps(Evil()))\n")
    subprocess.run([sys.executable, "-c", code, str(folder / "python_model.pkl")], check=True)
    text = (folder / "MLmodel").read_text()
    lines = [line for line in text.splitlines() if "model_code_path" not in line]
    at = next(i for i, line in enumerate(lines) if "loader_module" in line)
    indent = lines[at][:len(lines[at]) - len(lines[at].lstrip())]
    lines.insert(at + 1, f"{indent}python_model: python_model.pkl")
    (folder / "MLmodel").write_text("\n".join(lines) + "\n")
    three._client.set_model_version_tag("digits", "2", "files_sha256",
                                        json.dumps(file_hashes(folder)))
    status, out, _ = models("verify")
    assert status == 1, out
    assert not mark.exists()
    assert "FAILED loads" in out
    predictor, _ = three.load_predictor("models:/digits/2")  # never looks at it
    assert predictor.tasks == ["zero-one", "two-three"]
    assert not mark.exists()
