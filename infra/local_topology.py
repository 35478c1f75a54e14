"""The topology of compose.yaml as processes of this machine, and the main job through it.

    python infra/local_topology.py [--folder FOLDER] [--name NAME] [-- TRAIN OPTIONS]

A Ray head and a worker node that ask for a token, PostgreSQL, an MLflow server with a login on it,
and an S3 endpoint: AWS_ENDPOINT_URL_S3 with its keys where they are set, moto otherwise. All
listen on 127.0.0.1 at free ports and end with this program. PostgreSQL refuses to run as root, so
as root it runs as the user postgres. It imports nothing of the product and runs it as a user does.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
PROGRAMS = Path(__file__).with_name("bin")
SMALL = ["--preset", "digits", "--compare", "--tasks", "3", "--classes", "6", "--epochs", "3",
         "--trunk-epochs", "3"]
"""What is learned unless options are given: three tasks of two digits."""
STOP_SECONDS = 20


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Processes:
    """What was started, each with a log of its own; ends in the opposite order."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(self, name: str, command: Sequence[str | Path],
              environment: Mapping[str, str]) -> None:
        """Starts a program in a process group of its own."""
        with (self.logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([str(word) for word in command], stdout=log,
                                       stderr=subprocess.STDOUT, env=dict(environment),
                                       start_new_session=True)
        self._running.append((name, process))

    def wait_for(self, name: str, ready: Callable[[], bool], seconds: float = 400) -> None:
        """Waits until a program answers; shows its log where it ends instead."""
        start = time.monotonic()
        process = next(running for known, running in self._running if known == name)
        while not ready():
            if process.poll() is not None or time.monotonic() - start > seconds:
                log = (self.logs / f"{name}.log").read_text(errors="replace")
                raise SystemExit(f"{name} did not come up; its log ends:\n{log[-3000:]}")
            time.sleep(0.3)
        print(f"{name}: up after {time.monotonic() - start:.1f} s")

    def stop(self) -> None:
        """Asks each to end, and ends its whole group where it does not."""
        for _, process in reversed(self._running):
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(url: str) -> bool:
    """Whether a server answers at all; an error of HTTP is an answer too."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def start_s3(processes: Processes, environment: dict[str, str]) -> None:
    """The endpoint of the environment, or moto with keys of its own."""
    if environment.get("AWS_ENDPOINT_URL_S3"):
        print(f"s3: {environment['AWS_ENDPOINT_URL_S3']}")
        return
    port = free_port()
    environment |= {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
                    "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
                    "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
    processes.start("s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                    environment)
    processes.wait_for("s3", lambda: answers(environment["AWS_ENDPOINT_URL_S3"]))


def start_postgres(processes: Processes, folder: Path, environment: Mapping[str, str]) -> int:
    """A new PostgreSQL with a password; returns its port."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)
    binary = found[0] if found else Path(shutil.which("postgres") or "")
    if not binary.with_name("initdb").is_file():
        raise SystemExit("PostgreSQL is not installed; on Debian: apt-get install postgresql")
    data, password_file, port = folder / "postgres", folder / "postgres-password", free_port()
    password_file.touch(mode=0o600)
    password_file.write_text(environment["POSTGRES_PASSWORD"])
    data.mkdir(mode=0o700)
    other: list[str] = []
    if os.geteuid() == 0:
        other = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"]
        for path in (data, password_file):
            shutil.chown(path, "postgres", "postgres")
    plain = {"PATH": environment["PATH"], "LANG": "C.UTF-8"}
    subprocess.run([*other, str(binary.with_name("initdb")), "--pgdata", str(data), "--username",
                    "mlflow", "--pwfile", str(password_file), "--auth", "scram-sha-256"],
                   check=True, env=plain, stdout=subprocess.DEVNULL)
    processes.start("postgres", [*other, binary, "-D", data, "-p", str(port), "-h", "127.0.0.1",
                                 "-k", data], plain)
    ready = [binary.with_name("pg_isready"), "-h", "127.0.0.1", "-p", str(port), "-q"]
    processes.wait_for("postgres", lambda: not subprocess.call([str(word) for word in ready]))
    return port


def start_mlflow(processes: Processes, folder: Path, bucket: str, postgres: int,
                 environment: dict[str, str]) -> None:
    """An MLflow server that asks for a login."""
    port = free_port()
    processes.start("mlflow", [PROGRAMS / "partialhn-mlflow"], environment | {
        "POSTGRES_HOST": f"127.0.0.1:{postgres}", "POSTGRES_DB": "postgres",
        "MLFLOW_AUTH_ADMIN_PASSWORD": environment["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_urlsafe(32),
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{bucket}/mlflow",
        "MLFLOW_HOST": "127.0.0.1", "MLFLOW_PORT": str(port), "MLFLOW_WORKERS": "1",
        "TMPDIR": str(folder)})
    processes.wait_for("mlflow", lambda: answers(f"http://127.0.0.1:{port}/health"))
    environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"


def start_ray(processes: Processes, folder: Path, environment: Mapping[str, str]) -> str:
    """A head node and a worker node, a CPU each; returns the address."""
    address = f"127.0.0.1:{free_port()}"
    common = ["--num-cpus", "1", "--num-gpus", "0", "--block", "--disable-usage-stats",
              "--node-ip-address", "127.0.0.1", "--object-store-memory", str(300 << 20),
              "--min-worker-port", "0", "--max-worker-port", "0", "--metrics-export-port"]
    own = {"RAY_worker_niceness": "0"}  # Ray's 15 starves its workers beside other work
    # short: the path of a socket below it may have 107 characters
    processes.start("ray-head", [BIN / "ray", "start", "--head", "--port",
                                 address.rpartition(":")[2], "--temp-dir", folder / "r",
                                 "--include-dashboard", "false",
                                 "--ray-client-server-port", str(free_port()), *common,
                                 str(free_port())],
                    environment | own)
    check = [str(BIN / "ray"), "health-check", "--address", address]
    quiet = {"env": dict(environment), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes.wait_for("ray-head", lambda: not subprocess.call(check, **quiet))
    processes.start("ray-worker", [BIN / "ray", "start", "--address", address, *common,
                                   str(free_port())],
                    environment | own)
    log = processes.logs / "ray-worker.log"
    processes.wait_for("ray-worker", lambda: "Ray runtime started" in log.read_text())
    return address


@contextlib.contextmanager
def topology(folder: Path, bucket: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Everything up: Ray's address and the environment of a user of it."""
    environment = dict(os.environ) | {
        "PATH": f"{BIN}:{os.environ['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(24), "POSTGRES_PASSWORD": secrets.token_urlsafe(24),
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": secrets.token_urlsafe(24)}
    logs = folder / "logs"
    logs.mkdir()
    processes = Processes(logs)
    try:
        start_s3(processes, environment)
        subprocess.run([sys.executable, str(PROGRAMS / "partialhn-make-bucket"), bucket],
                       check=True, env=environment)
        postgres = start_postgres(processes, folder, environment)
        start_mlflow(processes, folder, bucket, postgres, environment)
        yield start_ray(processes, folder, environment), environment
    finally:
        processes.stop()
        print(f"all stopped; logs: {logs}")


def check_logs(logs: Path, environment: Mapping[str, str]) -> None:
    """Raises SystemExit where a secret that was made here stands in a log."""
    for name in ("RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "MLFLOW_TRACKING_PASSWORD",
                 "AWS_SECRET_ACCESS_KEY"):
        for log in logs.iterdir():
            if environment[name] in log.read_text(errors="replace"):
                raise SystemExit(f"{log} shows {name}")
    print("no secret in any log")


def main() -> int:
    """Brings the topology up, runs the main job and looks at what it registered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where data and logs lie; default: a new one")
    parser.add_argument("--name", default="topology", help="name of the stream and the bucket")
    parser.add_argument("options", nargs="*", help="options of partialhn train, after --")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing that was started stays behind
    folder = chosen.folder or Path(tempfile.mkdtemp(prefix="phn-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)  # PostgreSQL's user must get to its own folder
    bucket = f"partialhn-{chosen.name}"
    storage = ["--storage", f"s3://{bucket}/store"]
    with topology(folder, bucket) as (address, environment):
        for words in (["train", *(chosen.options or SMALL), "--name", chosen.name, *storage,
                       "--ray-address", address, "--result", str(folder / "result.json")],
                      ["show", "--name", chosen.name, *storage]):
            print(f"\n$ partialhn {' '.join(words)}", flush=True)
            code = subprocess.call([str(BIN / "partialhn"), *words], env=environment)
            if code:
                return code
    check_logs(folder / "logs", environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
