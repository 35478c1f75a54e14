"""A search that is killed goes on: every trial ends once, and the registry has each of them once.

Every process is a real one, started as a user starts it and ended with SIGKILL.
"""

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines.platform.storage import open_storage
from pipelines.search.state import SearchState

STREAM = ("--data", "digits", "--tasks", "3", "--input-size", "16", "--trunk-epochs", "1",
          "--trunk-batch-size", "32", "--augment", "crop", "--shard-rows", "500",
          "--fresh-columns", "4", "--batch-size", "32", "--threads", "1", "--epochs", "6")
SEARCH = ("--seeds", "1", "--name", "digits", "--algorithm", "random",
          "--early-stopping", "none")
pytestmark = [pytest.mark.timeout(3000), pytest.mark.slow]


class Session:
    """One `partialhn tune` process, and the processes below it."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("partialhn"), "tune", *STREAM, *SEARCH, *options],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.text = ""
        self._below: dict[int, psutil.Process] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.text += line

    def below(self) -> list[psutil.Process]:
        """Every process that was seen below it and is still there."""
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(self.process.pid).children(recursive=True)
            self._below |= {child.pid: child for child in children}
        return [child for child in self._below.values() if child.is_running()]

    def wait_for(self, holds, seconds: float = 600) -> None:
        """Until something holds; fails with the output when the process ends first."""
        end = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, self.text
            self.below()
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, and waits until no trial of it runs any more.

        Ray's own agents may take a minute more to notice; they are ended here.
        """
        left = self.below()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        _, alive = psutil.wait_procs(left, timeout=30)
        names = []
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                names.append(child.name())
                child.kill()
        assert all("Agent" in name for name in names), names

    def finish(self) -> str:
        """Waits for success; returns what it printed."""
        code = self.process.wait(1200)
        self._reader.join(60)
        assert code == 0, self.text
        return self.text

    def end(self) -> None:
        """Leaves no process behind, whatever happened."""
        for child in [*self.below(), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()


@pytest.fixture
def start():
    """Starts sessions; none outlives the test."""
    sessions: list[Session] = []

    def start(folder: Path, *options: str) -> Session:
        sessions.append(Session(folder, *options))
        return sessions[-1]
    yield start
    for session in sessions:
        session.end()


def state_of(folder: Path) -> SearchState:
    return SearchState(open_storage(str(folder / "partialhn-store")), "digits")


def outcome(folder: Path) -> dict:
    """What every trial tried and found, by id; seconds are left out, they differ."""
    found = {}
    for record in state_of(folder).records():
        values = dataclasses.asdict(record.plan)
        found[record.plan.id] = json.dumps([values, record.status, record.measured.rows,
                                            record.measured.test_row])
    return found


def check_registry(folder: Path) -> None:
    """One parent, one finished child for each record, nothing twice."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'partialhn-store' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    kinds = [run.data.tags["kind"] for run in runs]
    assert kinds.count("search") == 1
    children = sorted(run.data.tags["trial"] for run in runs if run.data.tags["kind"] == "trial")
    assert children == sorted(outcome(folder))
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_killed_search_goes_on(start, tmp_path):
    """Killed while trials ran: those that ended are kept, those that were begun come first."""
    state = state_of(tmp_path)
    first = start(tmp_path, "--depths", "3", "--budget", "3-trials")
    first.wait_for(lambda: len(state.records()) >= 1)
    first.kill()
    kept = {each.plan.id: each for each in state.records()}
    begun = {each.id for each in state.interrupted()}

    second = start(tmp_path, "--resume", "digits")
    text = second.finish()
    after = {each.plan.id: each for each in state.records()}
    assert {trial: after[trial] for trial in kept} == kept
    for trial in kept:
        assert f"trial {trial} " not in text
    for trial in begun:
        assert f"{trial} " in text
    searched = sorted(trial for trial in after if "-" not in trial)
    assert searched == ["0000", "0001", "0002"]
    check_registry(tmp_path)


def random_process(session: Session, chance: random.Random) -> None:
    """Kills the driver, or a worker that runs a trial."""
    workers = [child for child in session.below()
               if "run_trial" in " ".join(child.cmdline()) or "ImplicitFunc" in " ".join(
                   child.cmdline())]
    if workers and chance.random() < 0.4:
        with contextlib.suppress(psutil.NoSuchProcess):
            chance.choice(workers).send_signal(signal.SIGKILL)
    else:
        session.kill()


@pytest.mark.slow
def test_killed_five_times_at_random_it_finds_what_an_undisturbed_search_finds(start, tmp_path):
    seed = int(os.environ.get("PARTIALHN_CHAOS_SEED", "0"))
    chance = random.Random(seed)
    options = ("--depths", "3", "4", "--budget", "10-trials")
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    for folder in (calm, rough):
        folder.mkdir()
    start(calm, *options).finish()
    for kept in ("features", "trunks", "datasets"):
        shutil.copytree(calm / "partialhn-store" / kept, rough / "partialhn-store" / kept)
    state, kept = state_of(rough), {}
    for _ in range(5):
        session = start(rough, *options)
        wanted = len(state.records()) + 1
        session.wait_for(lambda wanted=wanted: len(state.records()) >= wanted)
        time.sleep(chance.uniform(0, 4))
        if session.process.poll() is None:
            random_process(session, chance)
        if session.process.poll() is None:  # a worker died: the driver goes on, and dies later
            time.sleep(chance.uniform(2, 8))
            if session.process.poll() is None:
                session.kill()
        found = {each.plan.id: each for each in state.records()}
        assert {trial: found[trial] for trial in kept} == kept, seed
        kept = found
    start(rough, *options).finish()
    found = {each.plan.id: each for each in state.records()}
    assert {trial: found[trial] for trial in kept} == kept, seed
    ids = {trial for trial in outcome(calm) if "-" not in trial}
    assert {trial: outcome(rough)[trial] for trial in ids} == {
        trial: outcome(calm)[trial] for trial in ids}, seed
    check_registry(rough)
