"""The registry on an MLflow server with PostgreSQL, as in earnest."""

import json
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg2
import pytest

from partialhn.errors import InputError
from pipelines.gate import GateFacts, Policy, decide
from pipelines.platform.storage import open_storage
from pipelines.registry.client import Placing, connect
from pipelines.registry.history import Move
from tests.processes import partialhn


def command(*words, cwd):
    """`partialhn ...` in a process of its own, as a user runs it."""
    return partialhn(*words, cwd=cwd).wait(300)


def test_a_stream_from_registration_to_rollback(server, digit_tasks, tmp_path):
    storage = open_storage(str(tmp_path / "store"))
    registry = connect(storage, server.uri)
    for index in (0, 1, 1):  # the last again, as after an interruption
        digit_tasks.register(registry, "shop", index)
    decision = decide(Policy(), GateFacts("four-five", 2, {"four-five": 0.5}, images=50)).fields()
    digit_tasks.register(registry, "shop", 2,
                         Placing(False, "gate-rejected", "at chance", decision=decision))
    versions = registry.versions("shop")
    assert [(v.version, v.aliases) for v in versions] == [
        (1, ("task-zero-one",)), (2, ("champion", "task-two-three")), (3, ("challenger",))]

    where = ("--name", "shop", "--storage", tmp_path / "store", "--tracking-uri", server.uri)
    refused = command("models", "promote", *where, cwd=tmp_path)
    assert refused.returncode == 3, refused.stderr
    assert "wanted at least 0.1" in refused.stderr
    back = command("models", "rollback", *where, "--why", "a test", "--json", cwd=tmp_path)
    assert back.returncode == 0, back.stderr
    assert json.loads(back.stdout)["champion"] == 1
    shown = command("models", "history", *where, "--json", cwd=tmp_path)
    assert [(e["kind"], e["from"], e["to"]) for e in json.loads(shown.stdout)["entries"]] == [
        ("trained", None, 1), ("trained", None, 1), ("trained", None, 2), ("trained", 1, 2),
        ("gate-rejected", None, 3), ("rollback", 2, 1)]
    checked = command("models", "verify", *where, "--version", "2", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "accuracy " in checked.stdout
    assert connect(storage, server.uri).resolve("models:/shop@champion").version == 1
    assert list(server.artifacts.rglob("model.safetensors")), "artifacts go through the server"
    assert not list(tmp_path.rglob("*.db"))


def test_aliases_and_tags_lie_in_postgresql(server, digit_tasks, tmp_path):
    registry = connect(open_storage(str(tmp_path / "store")), server.uri)
    digit_tasks.register(registry, "tables", 0)
    plain = server.database.replace("+psycopg2", "")
    with psycopg2.connect(plain) as connection, connection.cursor() as cursor:
        cursor.execute("select alias, version from registered_model_aliases where name = 'tables'"
                       " order by alias")
        assert cursor.fetchall() == [("champion", 1), ("task-zero-one", 1)]
        cursor.execute("select value from registered_model_tags where name = 'tables' and "
                       "key = 'history'")
        assert cursor.fetchone()[0] == str(tmp_path / "store/history/tables")


def _client(uri, folder, barrier, number):
    registry = connect(open_storage(folder), uri)
    barrier.wait()
    for step in range(6):
        registry.aliases.move("race", Move("champion", 1 + (number + step) % 3, "promoted",
                                           f"client {number}"))


def test_two_clients_at_once_lose_no_move(server, digit_tasks, tmp_path):
    folder = str(tmp_path / "store")
    registry = connect(open_storage(folder), server.uri)
    for index in range(3):
        digit_tasks.register(registry, "race", index)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    clients = [context.Process(target=_client, args=(server.uri, folder, barrier, n))
               for n in (0, 1)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(300)
        assert client.exitcode == 0
    entries = registry.aliases.history("race").entries()
    assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
    held = None
    for entry in (e for e in entries if e.move.alias == "champion"):
        assert entry.origin == held
        held = entry.move.to
    assert registry.resolve("models:/race@champion").version == held, "the last entry holds"
    assert registry.aliases.reconcile("race") == []


def _register(uri, folder, barrier, tasks, work):
    registry = connect(open_storage(folder), uri)
    barrier.wait()
    tasks.register(registry, "both", 0, work=work)


def test_two_clients_register_a_new_stream_at_once(server, digit_tasks, tmp_path):
    folder = str(tmp_path / "store")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    clients = [context.Process(target=_register, args=(server.uri, folder, barrier, digit_tasks,
                                                       f"work-{n}")) for n in (0, 1)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(300)
        assert client.exitcode == 0
    registry = connect(open_storage(folder), server.uri)
    assert sorted(v.tags["work"] for v in registry.versions("both")) == ["work-0", "work-1"]
    last = [e.move.to for e in registry.aliases.history("both").entries()
            if e.move.alias == "champion"][-1]
    assert registry.resolve("models:/both@champion").version == last


def test_two_clients_set_the_same_new_aliases(server, digit_tasks, tmp_path):
    """PostgreSQL refuses one of two inserts of the same alias; both clients go on all the same."""
    storage = open_storage(str(tmp_path / "store"))
    for index in range(2):
        digit_tasks.register(connect(storage, server.uri), "fresh", index)
    names = [f"task-new-{n}" for n in range(40)]
    barrier = threading.Barrier(4)

    def move_all(number):
        aliases = connect(storage, server.uri).aliases
        for name in names:
            barrier.wait(60)
            aliases.move("fresh", Move(name, number % 2 + 1, "promoted", f"client {number}"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(move_all, range(4)))
    registry = connect(storage, server.uri)
    assert registry.aliases.reconcile("fresh") == []
    found = {alias for version in registry.versions("fresh") for alias in version.aliases}
    assert found >= set(names)


def test_the_database_itself_as_registry_and_its_password(server, digit_tasks, tmp_path):
    storage = open_storage(str(tmp_path / "store"))
    registry = connect(storage, server.database)
    digit_tasks.register(registry, "direct", 0)
    assert connect(storage, server.uri).resolve("models:/direct@champion").version == 1
    wrong = server.database.replace("pg-Hush4711", "pg-Wrong0815")
    with pytest.raises(InputError) as caught:
        connect(storage, wrong)
    assert "password authentication failed" in str(caught.value)
    assert "pg-Wrong0815" not in str(caught.value)
    assert caught.value.__cause__ is None
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert b"pg-Hush4711" not in path.read_bytes(), path
    assert "pg-Hush4711" not in server.log.read_text()
