"""A real PostgreSQL and a real `mlflow server` on it, for the whole session.

Debian's package `postgresql` is enough; without it these tests skip and say so.
"""

import contextlib
import dataclasses
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

PASSWORD = "pg-Hush4711"


@dataclasses.dataclass(frozen=True)
class Server:
    """Where the two answer, and what they wrote to their logs."""

    uri: str
    database: str
    artifacts: Path
    log: Path


def binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"),
                   key=lambda path: int(path.parent.name.split(".")[0]))
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    return found[-1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def as_owner(folder: Path) -> list[str]:
    """PostgreSQL refuses to run as root: then as the user `postgres`, who owns the folder."""
    if os.getuid() != 0:
        return []
    try:
        owner = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("the session is root and there is no user postgres to run PostgreSQL as")
    os.chown(folder, owner.pw_uid, owner.pw_gid)
    return ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--init-groups"]


@contextlib.contextmanager
def running(words, log: Path, end=signal.SIGTERM, **options):
    with log.open("wb") as sink:
        process = subprocess.Popen(words, stdout=sink, stderr=sink, start_new_session=True,
                                   **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, end)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def wait(ready, process, log: Path, seconds: float = 420) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="session")
def database():
    """postgresql+psycopg2://... of a fresh cluster on a free port, with a password."""
    binary, folder = binaries(), Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    prefix, port = as_owner(folder), free_port()
    secret = folder / "password"
    try:
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        data = folder / "data"
        made = subprocess.run([*prefix, binary / "initdb", "-D", data, "-U", "partialhn", "-A",
                               "scram-sha-256", "--pwfile", secret, "--no-sync", "-E", "UTF8"],
                              capture_output=True, text=True, cwd="/", check=False)
        assert made.returncode == 0, made.stdout + made.stderr
        log = folder / "log"
        with running([*prefix, binary / "postgres", "-D", data, "-p", str(port), "-k", folder,
                      "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"],
                     log, signal.SIGINT, cwd="/") as process:  # SIGTERM waits for all clients
            wait(lambda: subprocess.run([binary / "pg_isready", "-h", "127.0.0.1", "-p", str(port)],
                                        capture_output=True, check=False).returncode == 0,
                 process, log)
            yield f"postgresql+psycopg2://partialhn:{PASSWORD}@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server(database, tmp_path_factory):
    """`mlflow server` on the database, with proxied artifacts."""
    folder, port = tmp_path_factory.mktemp("mlflow-server"), free_port()
    environment = os.environ | {"MLFLOW_BACKEND_STORE_URI": database}  # not in the process list
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
             "--workers", "1", "--artifacts-destination", str(folder / "artifacts")]
    uri, log = f"http://127.0.0.1:{port}", folder / "log"

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=5) as up:
            return up.status == 200
        return False

    with running(words, log, env=environment, cwd=folder) as process:
        wait(answers, process, log)
        yield Server(uri, database, folder / "artifacts", log)
