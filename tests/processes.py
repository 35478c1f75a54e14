"""Real processes for tests: started, watched, killed, and never left behind.

`Forked` starts a function in a new process of a server that has imported the heavy packages
already. Such a process begins in a tenth of a second where `python -c` takes seconds, and a
SIGKILL ends it as it ends any other. `Watched` is a command with its output and all processes
below it.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

HEAVY = ("torch", "pandas", "pyarrow.parquet", "sklearn.datasets", "mlflow", "pipelines.train",
         "pipelines.retrain.run", "pipelines.report.page", "pipelines.registry.client")
"""Packages that the server imports once. Ray is none of them: most runs have to do without it."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(HEAVY))


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended; the exit code is negative where a signal ended it."""

    returncode: int
    stdout: str
    stderr: str


class Forked:
    """A function that runs in a process of its own; `wait` gives its output."""

    def __init__(self, work: Callable[..., object], *arguments: object, cwd: Path,
                 environment: dict[str, str] | None = None) -> None:
        """work: a function of a module; what it returns or raises is its exit code."""
        self._texts = [Path(tempfile.mkstemp(prefix="forked-")[1]) for _ in range(2)]
        self._process = _context.Process(target=_run, args=(
            work, arguments, str(cwd), dict(os.environ) | (environment or {}), self._texts))
        self._process.start()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def wait(self, seconds: float = 500) -> Ended:
        """Waits for the end. Raises: TimeoutError, after it has killed the process."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError("".join(path.read_text() for path in self._texts))
        out, err = (path.read_text(errors="replace") for path in self._texts)
        for path in self._texts:
            path.unlink(missing_ok=True)
        return Ended(self._process.exitcode, out, err)


def partialhn(*words: object, cwd: Path, change: str = "",
              environment: dict[str, str] | None = None) -> Forked:
    """`partialhn ...` in a process of its own; `change` is Python that runs before it."""
    return Forked(_command, list(map(str, words)), change, cwd=cwd, environment=environment)


def _command(words: list[str], change: str) -> int:
    from pipelines.cli.main import run

    exec(compile(change, "change", "exec"), {"__name__": "change"})
    code = run(words)
    ray = sorted(name for name in sys.modules if name.partition(".")[0] == "ray")
    print("RAY", ray, file=sys.stderr)
    return code


def script(path: Path, *words: object, cwd: Path) -> Forked:
    """`python path words...` in a process of its own that has the heavy packages already."""
    return Forked(_script, str(path), list(map(str, words)), cwd=cwd)


def _script(path: str, words: list[str]) -> None:
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def _run(work, arguments, cwd, environment, texts) -> None:
    """In the new process: output to files, so that what was printed before a SIGKILL is kept."""
    for number, path in enumerate(texts, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    code: object = 1
    try:
        code = work(*arguments)
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)
