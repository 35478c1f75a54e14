"""Of several that want a stream one has it; a dead one does not keep it; the log says who wrote."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from pipelines.platform import lease as module
from pipelines.platform.lease import Lease, LeaseLostError
from pipelines.platform.storage import open_storage
from pipelines.retrain.journal import Journal


@pytest.fixture
def storage(tmp_path):
    return open_storage(str(tmp_path))


def test_one_has_it_and_the_other_hears_who(storage):
    first, second = Lease(storage, "s"), Lease(storage, "s")
    with first:
        assert first.acquire() is None
        holder = second.acquire()
        assert (holder.pid, holder.token) == (os.getpid(), 1)
        assert f"process {os.getpid()}" in str(holder)
        assert first.check() == 1
    with second:
        assert second.acquire() is None
        assert second.token == 2
        with pytest.raises(LeaseLostError, match=r"taken over .* number 2, ours was 1"):
            first.check()
    assert Lease(storage, "other").acquire() is None


def _race(root, barrier, results):
    lease = Lease(open_storage(root), "s")
    barrier.wait()
    results.put(lease.acquire() is None)
    barrier.wait()


def test_eight_at_the_same_moment(storage):
    for _ in range(5):
        context = multiprocessing.get_context("fork")
        barrier, results = context.Barrier(8), context.Queue()
        racing = [context.Process(target=_race, args=(storage.root, barrier, results))
                  for _ in range(8)]
        for process in racing:
            process.start()
        won = [results.get(timeout=60) for _ in racing]
        for process in racing:
            process.join(60)
        assert sorted(won) == [False] * 7 + [True]


def test_it_expires(storage, monkeypatch):
    monkeypatch.setattr(module, "machine", lambda: "")  # as on another machine
    first = Lease(storage, "s", seconds=3600)
    assert first.acquire() is None
    assert Lease(storage, "s").acquire().token == 1
    storage.write_text(storage.path("streams", "s", "lease", "00000001.beat.json"),
                       json.dumps({"expires": storage.now() - 1}))
    second = Lease(storage, "s")
    assert second.acquire() is None
    with pytest.raises(LeaseLostError):
        first.check()
    assert second.check() == 2
    second.release()


def test_it_is_kept_alive_while_it_is_held(storage, monkeypatch):
    monkeypatch.setattr(module, "machine", lambda: "")
    with Lease(storage, "s", seconds=4) as held:
        assert held.acquire() is None
        time.sleep(4.5)
        assert held.check() == 1
        assert Lease(storage, "s").acquire().token == 1


def test_a_holder_that_cannot_write_stops_by_itself(storage, monkeypatch):
    held = Lease(storage, "s", seconds=0.6)
    monkeypatch.setattr(held, "_write_beat", lambda expires: (_ for _ in ()).throw(OSError))
    assert held.acquire() is None
    time.sleep(0.7)
    with pytest.raises(LeaseLostError, match=r"could not show for 0\.6 s"):
        held.check()
    held._stop.set()


def test_a_killed_holder_on_this_machine_is_noticed_at_once(storage):
    code = ("import sys, time; from pipelines.platform.lease import Lease; "
            "from pipelines.platform.storage import open_storage; "
            "print(Lease(open_storage(sys.argv[1]), 's').acquire(), flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code, storage.root], text=True,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline().strip() == "None"
    assert Lease(storage, "s").acquire().pid == process.pid
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    after = Lease(storage, "s")
    assert after.acquire() is None
    assert after.token == 2
    after.release()
    left = {entry.path.rpartition("/")[2] for entry in storage.list(storage.path("streams"))}
    assert left == {"00000002.json", "00000002.beat.json"}


def test_the_log_takes_events_in_order_and_refuses_an_old_lease(storage):
    first, second = Lease(storage, "s"), Lease(storage, "s")
    first.acquire()
    journal = Journal(storage, "s")
    journal.append(first, "founded", {"config": {"a": 1}})
    slept = Journal(storage, "s")
    assert [event.kind for event in slept.events()] == ["founded"]
    first.release()
    second.acquire()
    Journal(storage, "s").append(second, "pass", {})
    first.token, first.check = 1, lambda: 1  # paused after its check, and woke up now
    with pytest.raises(LeaseLostError, match="newer than 1"):
        slept.append(first, "decided", {})
    fresh = Journal(storage, "s")
    with pytest.raises(LeaseLostError):
        fresh.append(first, "decided", {})
    assert [(e.number, e.token, e.kind) for e in fresh.events()] == [(1, 1, "founded"),
                                                                     (2, 2, "pass")]
    assert fresh.config() == {"a": 1}
    second.release()
