"""The recorded year: what the gate stopped, what was undone, and what a pass costs late in it."""

import json
import statistics
from pathlib import Path

YEAR = json.loads((Path(__file__).parent / "year.json").read_text(encoding="utf-8"))
CHAOS = json.loads((Path(__file__).parent / "chaos.json").read_text(encoding="utf-8"))
PASSES = {each["event"]: each for each in YEAR["passes"]}


def test_the_poisoned_task_was_stopped_and_the_others_went_on():
    poisoned = PASSES["task-09 (poisoned)"]
    assert poisoned["exit_code"] == 3
    assert poisoned["champion"] == PASSES["task-08"]["champion"]
    assert PASSES["task-10"]["exit_code"] == 0
    assert "task-09" not in YEAR["tasks"]


def test_the_rollback_and_the_refresh_are_in_the_history():
    moves = {(each["kind"], each["alias"]): each for each in YEAR["history"]}
    back = moves["rollback", "champion"]
    assert back["to"] == back["from"] - 1
    assert PASSES["after a rollback"]["champion"] == back["to"]
    assert moves["refresh", "champion"]["to"] == PASSES["task-01/2026-11"]["champion"]
    assert "task-01/2026-11" in YEAR["tasks"]
    assert [each["seq"] for each in YEAR["history"]] == list(range(1, len(YEAR["history"]) + 1))


def test_what_is_new_costs_the_same_late_in_the_year():
    """Of tasks of ten classes; measuring all tasks again is what grows with their number."""
    def seconds(each):
        task = each["learned"][0]["seconds"]
        return task["features"] + task["train"] + each["stages"]["register"]

    learned = [each for each in YEAR["passes"] if each["stored_bytes"] > 20_000_000][1:]
    early, late = (statistics.median(map(seconds, part)) for part in (learned[:6], learned[-6:]))
    assert late < 1.15 * early
    assert learned[-1]["stored_bytes"] < 1.05 * learned[0]["stored_bytes"]
    assert YEAR["forgetting"] == 0


def test_servers_were_killed_and_nothing_was_lost():
    kills = CHAOS["servers"]["kills"]
    assert set(kills) == {"PostgreSQL", "mlflow", "S3"}
    assert min(kills.values()) >= 1


def test_fifty_kills_anywhere_and_more_of_them_late_in_a_pass():
    assert sum(CHAOS["anywhere"]["kills"].values()) == 50
    late = CHAOS["anywhere_late_in_a_pass"]["kills"]
    assert all(late[whom] for whom in ("driver", "RayTrainWorker", "MapWorker", "raylet"))
