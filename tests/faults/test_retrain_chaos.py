"""SIGKILL at random moments of a pass on Ray: each task once, a whole history, the same weights.

    python -m pytest tests/faults/test_retrain_chaos.py -k 50    driver, workers, raylet: 50 kills
    python -m pytest tests/faults/test_retrain_chaos.py -k services    the servers beside them

The seed decides when and whom; the same command is started again each time. A server that was
killed is back, with its data, seconds later.
"""

import contextlib
import dataclasses
import json
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from partialhn.config import ComputeConfig, Config
from partialhn.run import run_stream
from pipelines.features.produce import open_store
from pipelines.platform.lease import Lease
from pipelines.platform.s3 import s3_client
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from pipelines.retrain.journal import Journal
from tests.support import SECRETS, names_of_files_without_secrets, small_config

TASKS = {"a": (0, 1), "b": (2, 3), "c": (4, 5)}
CONFIG = small_config(data={"data": "inbox"}, compute={"ray_address": "local"}).to_dict()
PARTIALHN = Path(sys.executable).with_name("partialhn")
WHOM = ("driver", "RayTrainWorker", "_train_trunk", "MapWorker", "raylet")
PASS = 50.0
"""Seconds of an undisturbed pass on two cores: kills must come late in it too."""
KILLS_A_STREAM = 10


@dataclasses.dataclass
class Stream:
    """Where a stream lives, and which servers beside it may be killed."""

    root: Path
    storage: str
    tracking_uri: str | None = None
    servers: dict[str, Any] = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return ["--name", "s", "--storage", self.storage,
                *(["--tracking-uri", self.tracking_uri] if self.tracking_uri else [])]

    def open(self):
        return open_storage(self.storage)

    def log(self) -> str:
        return (self.root / "log.txt").read_text()


def local(root: Path, ray_folder: Path) -> Stream:
    """A stream in a folder, its tasks in the inbox; its passes have credentials of nobody."""
    put_tasks(root)
    return Stream(root, str(root / "store"),
                  environment=SECRETS | {"RAY_TMPDIR": str(ray_folder)})


def put_tasks(root: Path) -> None:
    digits = load_digits()
    for task, labels in TASKS.items():
        for label in labels:
            pixels_NHW = (digits.images[digits.target == label] * 15.9).astype(np.uint8)
            for number in range(80):
                folder = root / "store" / "inbox" / task / ("train" if number % 5 else "test")
                (folder / str(label)).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels_NHW[number]).save(folder / str(label) / f"{number}.png")
        (root / "store" / "inbox" / task / "_READY").write_text("")
        os.utime(root / "store" / "inbox" / task / "_READY", (100, 100))
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))


class Started:
    """A `partialhn retrain` process and everything below it."""

    def __init__(self, stream: Stream) -> None:
        self.log = (stream.root / "log.txt").open("a")
        self.process = subprocess.Popen(
            [PARTIALHN, "retrain", *stream.words, "--config", stream.root / "config.yaml"],
            stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True, cwd=stream.root,
            env=os.environ | stream.environment)
        self.seen: dict[int, psutil.Process] = {}

    def below(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= {child.pid: child for child in
                          psutil.Process(self.process.pid).children(recursive=True)}
        return [child for child in self.seen.values() if child.is_running()]

    def kill(self, whom: str) -> bool:
        """SIGKILL; says whether there was somebody."""
        if whom == "driver":
            self.process.send_signal(signal.SIGKILL)
            return True
        for child in self.below():
            with contextlib.suppress(psutil.Error):
                if whom in " ".join(child.cmdline()):
                    child.kill()
                    return True
        return False

    def end(self) -> None:
        """Leaves no process behind."""
        for child in [*self.below(), self.process]:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                child.kill()
        self.process.wait(60)
        self.log.close()


def chaos(stream: Stream, kills: int, seed: int, quiet: float = PASS) -> dict[str, int]:
    """Starts the command again and again; a kill comes every `quiet` seconds at the most.

    Whoever lives through a kill (a pass whose server came back, a driver whose worker is started
    again) may meet the next one in the same pass.
    """
    whom = tuple(stream.servers) or WHOM
    chance, killed = random.Random(seed), dict.fromkeys(whom, 0)
    deadline = time.monotonic() + (60 + quiet) * kills + 900
    while True:
        run = Started(stream)
        try:
            while sum(killed.values()) < kills and run.process.poll() is None:
                until = time.monotonic() + chance.uniform(0.1, 1.0) * quiet
                while time.monotonic() < until and run.process.poll() is None:
                    run.below()
                    time.sleep(0.1)
                rarest_first = sorted(chance.sample(whom, len(whom)), key=killed.__getitem__)
                for each in rarest_first:
                    if run.process.poll() is None and kill(stream, run, each, chance):
                        killed[each] += 1
                        break
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(300)
            code = run.process.poll()
        finally:
            run.end()
        assert time.monotonic() < deadline, stream.log()[-3000:]
        if code == 0 and len(Journal(stream.open(), "s").decided()) == len(TASKS):
            return killed


def kill(stream: Stream, run: Started, whom: str, chance: random.Random) -> bool:
    """SIGKILL to a process of the run, or to a server, which then comes back."""
    if whom not in stream.servers:
        return run.kill(whom)
    stream.servers[whom].kill()
    time.sleep(chance.uniform(0.5, 4.0))
    stream.servers[whom].start()
    return True


def last_pass(stream: Stream) -> dict:
    """One undisturbed pass at the end: nothing is left to do."""
    done = subprocess.run([PARTIALHN, "retrain", *stream.words, "--json"], capture_output=True,
                          text=True, check=True, cwd=stream.root)
    return json.loads(done.stdout)


def check(stream: Stream, weights: str) -> None:
    storage = stream.open()
    assert last_pass(stream)["nothing_to_do"]
    registry = connect(storage, stream.tracking_uri)
    versions = registry.versions("s")
    assert [version.task for version in versions] == list(TASKS), "every task exactly once"
    assert [version.tags["gate"] for version in versions] == ["passed"] * len(TASKS)
    moves = [entry.move.to for entry in registry.aliases.history("s").entries()
             if entry.move.alias == "champion"]
    assert moves == [version.version for version in versions], "the history is complete"
    predictor, champion = registry.load_predictor("models:/s@champion")
    assert champion.version == versions[-1].version
    assert predictor.tasks == list(TASKS)
    assert champion.tags["weights_hash"] == weights
    store = open_store(storage, ComputeConfig(cache=str(stream.root / "cache")))
    for decided in Journal(storage, "s").decided():
        for manifest in decided.with_features(store).manifests.values():
            assert len(store.open(manifest)) == manifest.rows
    lease = Lease(storage, "s")
    assert lease.acquire() is None, "an orphaned lease"
    lease.release()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights of the same tasks that nothing happens to, learned in one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    put_tasks(root)
    config = Config.from_dict(CONFIG | {"data": {"data": str(root / "store" / "inbox"),
                                                 "input_size": 16}})
    return run_stream(config, root / "oracle").model.weights_hash()


@pytest.fixture
def ray_folder():
    """Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_anywhere(undisturbed, tmp_path, ray_folder, kills):
    """Begun anew after so many kills, or when a stream is learned before: each has a trunk and
    features to be killed in. Nothing that is left behind, logs of Ray included, has a credential.
    """
    dealt, seed = dict.fromkeys(WHOM, 0), 0
    while sum(dealt.values()) < kills:
        root = tmp_path / str(seed)
        root.mkdir()
        stream = local(root, ray_folder)
        left = kills - sum(dealt.values())
        # two kills come early, to end soon; fifty come in every phase of a pass
        quiet = PASS if kills > 2 else PASS / 3
        for whom, count in chaos(stream, min(left, KILLS_A_STREAM), seed, quiet).items():
            dealt[whom] += count
        check(stream, undisturbed)
        seed += 1
        (tmp_path / "dealt.json").write_text(json.dumps(dealt | {"streams": seed}))
    assert sum(dealt.values()) >= kills
    assert {"mlflow.db", "log.txt", "raylet.out"} <= names_of_files_without_secrets(tmp_path,
                                                                                   ray_folder)


# Servers -------------------------------------------------------------------------------------


class Server:
    """A server process that can be killed and started again on the same data."""

    def __init__(self, begin: Callable[[], subprocess.Popen], ready: Callable[[], bool]) -> None:
        self._begin, self._ready, self._process = begin, ready, None
        self.start()

    def start(self) -> None:
        """Returns when it answers; again where what was killed still held a lock."""
        end = time.monotonic() + 180
        self._process = self._begin()
        while not self._ready():
            assert time.monotonic() < end, f"{self._process.args} does not come up"
            if self._process.poll() is not None:
                self._process = self._begin()
            time.sleep(0.3)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Ceph:
    """An S3 service of this test's own: SIGKILL to one of its daemons, or to all."""

    def __init__(self, tool: Path, port: int, chance: random.Random) -> None:
        self._tool, self._chance = tool, chance
        self._folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
        self._environment = os.environ | {"S3_TEST_DIR": str(self._folder),
                                          "S3_TEST_PORT": str(port)}
        self.answer: dict[str, str] = {}
        self.start()

    def start(self) -> None:
        done = subprocess.run(["bash", self._tool], env=self._environment, check=True, text=True,
                              stdout=subprocess.PIPE)
        self.answer = dict(line.split("=", 1) for line in done.stdout.splitlines())

    def kill(self) -> None:
        daemons = ("rgw", "osd", "mon")
        for name in self._chance.choice([*((each,) for each in daemons), daemons]):
            pid = int((self._folder / "run" / f"{name}.pid").read_text())
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        subprocess.run(["bash", self._tool.with_name("s3down.sh"), "--wipe"],
                       env=self._environment, check=True)


def begin(words, log: Path, **options) -> Callable[[], subprocess.Popen]:
    def start() -> subprocess.Popen:
        with log.open("ab") as sink:
            return subprocess.Popen(words, stdout=sink, stderr=sink, start_new_session=True,
                                    **options)
    return start


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
        return True
    return False


@contextlib.contextmanager
def servers(root: Path, monkeypatch):
    """A stream on servers of its own: PostgreSQL, MLflow on it, and S3."""
    tool = Path(__file__).resolve().parents[3] / "shared" / "tools" / "s3up.sh"
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not tool.exists() or not found or os.getuid() != 0:
        pytest.skip("needs ../shared/tools/s3up.sh, PostgreSQL, and root to start it as postgres")
    chance = random.Random(0)
    ceph = Ceph(tool, chance.randrange(21000, 29000, 25), chance)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ceph.answer["S3_ACCESS_KEY"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ceph.answer["S3_SECRET_KEY"])
    home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    owner = pwd.getpwnam("postgres")
    os.chown(home, owner.pw_uid, owner.pw_gid)
    as_owner = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]
    pg_port, port = 29100, 29101
    subprocess.run([*as_owner, found[-1] / "initdb", "-D", home / "data", "-U", "partialhn", "-A",
                    "trust"], check=True, capture_output=True, cwd="/")
    names = {}
    try:
        names["PostgreSQL"] = Server(begin(
            [*as_owner, found[-1] / "postgres", "-D", home / "data", "-p", str(pg_port), "-k",
             home, "-c", "listen_addresses=127.0.0.1"], root / "pg.log", cwd="/"),
            lambda: subprocess.run([found[-1] / "pg_isready", "-q", "-h", "127.0.0.1", "-p",
                                    str(pg_port)], check=False).returncode == 0)
        names["mlflow"] = Server(begin(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
             "--workers", "1", "--artifacts-destination", root / "artifacts",
             "--backend-store-uri", f"postgresql+psycopg2://partialhn@127.0.0.1:{pg_port}/postgres"],
            root / "mlflow.log"), lambda: answers(port))
        names["S3"] = ceph
        storage = f"s3://chaos/stream?endpoint={ceph.answer['S3_ENDPOINT']}&region=us-east-1"
        s3_client(open_storage(storage).s3).create_bucket(Bucket="chaos")
        yield Stream(root, storage, f"http://127.0.0.1:{port}", names)
    finally:
        for name in ("mlflow", "PostgreSQL"):
            if name in names:
                names[name].kill()
        ceph.end()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_services_killed(undisturbed, tmp_path, monkeypatch):
    """`mlflow server`, PostgreSQL and S3 die during a pass and come back: nothing is lost."""
    with servers(tmp_path, monkeypatch) as stream:
        put_tasks(tmp_path)
        inbox = tmp_path / "store" / "inbox"
        storage = stream.open()
        for path in sorted((each for each in inbox.rglob("*") if each.is_file()),
                           key=lambda each: each.name == "_READY"):
            storage.put_if_absent(storage.path("inbox", *path.relative_to(inbox).parts),
                                  path.read_bytes())
        dealt = chaos(stream, 6, seed=0, quiet=15.0)
        check(stream, undisturbed)
    assert min(dealt.values()) >= 1, dealt
    (tmp_path / "dealt.json").write_text(json.dumps(dealt))
