"""Is everything there that a run needs? Asked from the driver, and from every node of Ray.

A check never raises: what goes wrong in it is its finding, with what to do about it.
"""

import concurrent.futures
import dataclasses
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from partialhn.config import ComputeConfig
from pipelines.features.produce import cache_folder
from pipelines.platform.cluster import start_ray
from pipelines.platform.storage import Storage
from pipelines.platform.text import table
from pipelines.registry.client import connect
from pipelines.registry.connection import chosen_uri, sqlite_file

MAX_SKEW = 60.0
"""Seconds between a machine's clock and the storage's; leases and S3's signatures need it."""
MIN_CACHE, MIN_SHM = 2 * 2**30, 2**30
PACKAGES = ("partialhn", "ray", "torch", "torchvision", "pyarrow", "mlflow", "numpy")
NODE_SECONDS = 120.0
"""Within which a node must answer."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    place: str
    """driver, or the address of a node."""
    what: str
    passed: bool
    found: str
    remedy: str = ""
    """What to do where it did not pass."""


def examine(storage: Storage, tracking_uri: str | None, compute: ComputeConfig) -> list[Check]:
    """Every check of the driver and of every node that is alive.

    Raises: InputError where no cluster answers at the address given.
    """
    checks = [*check_machine("driver", storage, compute), check_registry(storage, tracking_uri)]
    start_ray(compute.ray_address)
    nodes = _ask_nodes(storage, compute)
    return checks + nodes + check_versions([each for each in checks + nodes
                                            if each.what == "packages"])


def lines(checks: Sequence[Check]) -> list[str]:
    """The checks as a table, and below it what to do about each failure."""
    rows = [("where", "what", "", "found")]
    rows += [(each.place, each.what, "ok" if each.passed else "FAILED", each.found)
             for each in checks]
    failed = [each for each in checks if not each.passed]
    advice = [f"{each.place}, {each.what}: {each.remedy}" for each in failed]
    return [*table(rows), "", *advice,
            f"{len(failed)} of {len(checks)} checks failed" if failed
            else f"all {len(checks)} checks passed"]


def check_machine(place: str, storage: Storage, compute: ComputeConfig) -> list[Check]:
    """What this machine can do: storage, clock, packages, GPUs and room."""
    asked: list[tuple[str, Callable[[], str], str]] = [
        ("storage", lambda: _storage(storage), "see the message; every machine needs the same "
         "access, with keys from its own AWS environment, profile or role"),
        ("clock", lambda: _clock(storage), "set the clock (chrony, ntpd)"),
        ("packages", _packages, "install the same requirements.lock on every machine"),
        ("GPUs", lambda: _gpus(compute), "check the driver and CUDA_VISIBLE_DEVICES, or give "
         "--device cpu"),
        ("cache", lambda: _room(_cache_folder(compute), MIN_CACHE), "free some disk, or name "
         "another folder with --cache"),
        ("/dev/shm", lambda: _room(Path("/dev/shm"), MIN_SHM), "give the machine or container more "
         "shared memory (docker: --shm-size): Ray keeps its objects there")]
    return [_look(place, *each) for each in asked]


def check_registry(storage: Storage, tracking_uri: str | None) -> Check:
    """Whether MLflow answers, with a schema that this client knows."""
    def ask() -> str:
        uri = chosen_uri(storage, tracking_uri)
        if (file := sqlite_file(uri)) and not file.exists():
            return f"none yet; the first run makes {uri}"
        connect(storage, tracking_uri)
        return f"MLflow {metadata.version('mlflow')} answers"

    return _look("driver", "MLflow", ask, "start the server or give the right --tracking-uri; for "
                 "an old schema: mlflow db upgrade URI")


def check_versions(packages: Sequence[Check]) -> list[Check]:
    """Whether every node has the driver's packages."""
    expected = packages[0].found
    return [Check(each.place, "same packages as the driver", each.found == expected,
                  "yes" if each.found == expected else _difference(expected, each.found),
                  "install the driver's versions there: make setup, or the same image")
            for each in packages[1:]]


def _ask_nodes(storage: Storage, compute: ComputeConfig) -> list[Check]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(num_cpus=0, max_retries=0)(check_machine)
    asked = [(node["NodeManagerAddress"],
              remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(
                  node["NodeID"], soft=False)).remote(
                      f"node {node['NodeManagerAddress']}", storage, compute))
             for node in ray.nodes() if node["Alive"]]
    checks: list[Check] = []
    for address, reference in asked:
        try:
            checks += ray.get(reference, timeout=NODE_SECONDS)
        except Exception as error:  # whatever ails the node is what is asked
            checks.append(Check(f"node {address}", "answers", False, _short(error),
                                "look at the node's raylet, and whether partialhn is installed "
                                "there"))
    return checks


def _look(place: str, what: str, ask: Callable[[], str], remedy: str) -> Check:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            return Check(place, what, True, pool.submit(ask).result())
        except Exception as error:  # a check reports, whatever happens in it
            return Check(place, what, False, _short(error), remedy)


def _storage(storage: Storage) -> str:
    """Put, get, list, conditional put and delete, in a folder of its own."""
    storage.check()
    folder = storage.path(".doctor", uuid.uuid4().hex)
    path, content = f"{folder}/probe", uuid.uuid4().hex
    try:
        if not storage.put_if_absent(path, content.encode()):
            raise RuntimeError(f"a conditional write of the new file {path} was refused")
        if storage.put_if_absent(path, b"another"):
            raise RuntimeError("a conditional write replaced a file that was there: this service "
                               "does not honour If-None-Match, and two writers would mix")
        if storage.read_text(path) != content:
            raise RuntimeError(f"{path} reads differently from what was written")
        if [entry.path for entry in storage.list(folder)] != [path]:
            raise RuntimeError(f"{folder} does not list the file that was written")
    finally:
        storage.delete(folder)
    if storage.stat(path) is not None:
        raise RuntimeError(f"{path} is there after it was deleted")
    return f"{storage.uri}: put, get, list, conditional put, delete"


def _clock(storage: Storage) -> str:
    before = time.time()
    there = storage.now()
    skew = there - (before + time.time()) / 2
    if abs(skew) > MAX_SKEW:
        raise RuntimeError(f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the "
                           f"storage's; allowed: {MAX_SKEW:.0f} s")
    return f"{abs(skew):.1f} s from the storage's"


def _packages() -> str:
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    return ", ".join([*found, f"python {platform.python_version()}"])


def _gpus(compute: ComputeConfig) -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if not names and compute.device == "gpu":
        raise RuntimeError("none, and device is gpu")
    return ", ".join(names) or "none"


def _cache_folder(compute: ComputeConfig) -> Path:
    folder = cache_folder(compute)
    while not folder.exists():
        folder = folder.parent
    return folder


def _room(folder: Path, least: int) -> str:
    free = shutil.disk_usage(folder).free
    if free < least:
        raise RuntimeError(f"{free / 2**30:.2f} GiB free at {folder}; allowed: "
                           f"{least / 2**30:.0f} GiB or more")
    return f"{free / 2**30:.1f} GiB free at {folder}"


def _difference(expected: str, found: str) -> str:
    ours, theirs = set(expected.split(", ")), set(found.split(", "))
    return f"{_listed(theirs - ours)} where the driver has {_listed(ours - theirs)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[-1] if text else type(error).__name__)[:400]


def fields(checks: Sequence[Check]) -> dict[str, Any]:
    """Plain values for machines."""
    return {"passed": all(each.passed for each in checks),
            "checks": [dataclasses.asdict(each) for each in checks]}
