"""Checks of everything that a run needs, on the driver and on every node of Ray.

A check never raises an error: the error is its result, together with what to do about it.
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
from partialhn.environment import check_threads, set_variables
from pipelines.features.produce import cache_folder
from pipelines.platform.cluster import cluster_nodes, start_ray, worker_device
from pipelines.platform.storage import Storage
from pipelines.platform.text import table
from pipelines.registry.client import connect
from pipelines.registry.connection import chosen_uri, sqlite_file
from pipelines.registry.versions import CHAMPION
from pipelines.settings import mask_password

MAX_SKEW = 60.0
"""Largest allowed difference in seconds between a machine's clock and the storage's; leases and
S3's signatures depend on it."""
MIN_CACHE, MIN_SHM = 2 * 2**30, 2**30
"""Smallest free space in bytes for the feature cache and for shared memory."""
PACKAGES = ("partialhn", "ray", "torch", "torchvision", "pyarrow", "mlflow", "numpy")
NODE_SECONDS = 120.0
"""Seconds within which a node must reply."""


@dataclasses.dataclass(frozen=True)
class DoctorCheck:
    """The result of one check."""

    place: str
    """The driver, or the address of a node."""
    what: str
    """Name of the check."""
    passed: bool
    found: str
    """The value found, in words."""
    remedy: str = ""
    """Advice for a check that failed."""


def examine(storage: Storage, tracking_uri: str | None, compute: ComputeConfig,
            name: str | None = None) -> list[DoctorCheck]:
    """Runs every check on the driver and on every node that is alive.

    name: a stream whose champion is checked, too. Raises: InputError if no cluster answers at the
    given address.
    """
    checks = [*check_machine("driver", storage, compute), check_registry(storage, tracking_uri)]
    if name is not None:
        checks.append(check_champion(storage, tracking_uri, name))
    start_ray(compute.ray_address)
    nodes = [*_ask_nodes(storage, compute), check_device(compute)]
    return checks + nodes + check_versions([check for check in checks + nodes
                                            if check.what == "packages"])


def lines(checks: Sequence[DoctorCheck]) -> list[str]:
    """The checks as a table, and below it the advice for each failure."""
    rows = [("where", "what", "", "found")]
    rows += [(check.place, check.what, "ok" if check.passed else "FAILED", check.found)
             for check in checks]
    failed = [check for check in checks if not check.passed]
    advice = [f"{check.place}, {check.what}: {check.remedy}" for check in failed]
    return [*table(rows), "", *advice,
            f"{len(failed)} of {len(checks)} checks failed" if failed
            else f"all {len(checks)} checks passed"]


def check_machine(place: str, storage: Storage, compute: ComputeConfig,
                  gpus: int = 0) -> list[DoctorCheck]:
    """Checks this machine: storage, clock, packages, environment, GPUs and free space.

    gpus: GPUs that Ray counts here.
    """
    checks: list[tuple[str, Callable[[], str], str]] = [
        ("storage", lambda: _storage(storage), "see the message; every machine needs the same "
         "access, with keys from its own AWS environment, profile or role"),
        ("clock", lambda: _clock(storage), "set the clock (chrony, ntpd)"),
        ("packages", _packages, "install the same requirements.lock on every machine"),
        ("environment", lambda: _environment(compute), "unset the variable, or leave the option "
         "out"),
        ("GPUs", lambda: _gpus(gpus), "install PyTorch with CUDA there, check the driver and "
         "CUDA_VISIBLE_DEVICES, or give --device cpu"),
        ("cache", lambda: _room(_cache_folder(compute), MIN_CACHE), "free some disk, or name "
         "another folder with --cache"),
        ("/dev/shm", lambda: _room(Path("/dev/shm"), MIN_SHM), "give the machine or container more "
         "shared memory (docker: --shm-size): Ray keeps its objects there")]
    return [_run_check(place, *check) for check in checks]


def check_registry(storage: Storage, tracking_uri: str | None) -> DoctorCheck:
    """Checks that MLflow answers with a database schema that this client supports."""
    def connect_to_mlflow() -> str:
        uri = chosen_uri(storage, tracking_uri)
        if (file := sqlite_file(uri)) and not file.exists():
            return f"none yet; the first run creates {uri}"
        connect(storage, tracking_uri).open()
        return f"MLflow {metadata.version('mlflow')} answers"

    return _run_check("driver", "MLflow", connect_to_mlflow, "start the server or give the right "
                      "--tracking-uri; for an old schema: mlflow db upgrade URI")


def check_champion(storage: Storage, tracking_uri: str | None, name: str) -> DoctorCheck:
    """Checks that a stream's aliases are those of its history, and its champion's files sound."""
    def check() -> str:
        registry = connect(storage, tracking_uri, create=False)
        champion = registry.resolve(f"models:/{name}@{CHAMPION}")
        for difference in registry.aliases.differences(name):
            raise RuntimeError(difference)
        registry.require_sound(champion)
        return f"{champion.uri} (task {champion.task!r}): files as registered"

    return _run_check("driver", "champion", check, "see the message")


def check_device(compute: ComputeConfig) -> DoctorCheck:
    """Checks that the cluster has a device for every worker; the driver needs none."""
    def check() -> str:
        gpus = worker_device(compute, cluster_nodes()).gpus
        return f"one {'GPU' if gpus else 'CPU'} for each of {compute.workers} workers"

    return _run_check("cluster", "device", check, "add machines, or ask for fewer workers or "
                      "--device cpu")


def check_versions(packages: Sequence[DoctorCheck]) -> list[DoctorCheck]:
    """Checks that every node has the driver's versions of the packages."""
    expected = packages[0].found
    return [DoctorCheck(node.place, "same packages as the driver", node.found == expected,
                  "yes" if node.found == expected else _difference(expected, node.found),
                  "install the driver's versions there: make setup, or the same image")
            for node in packages[1:]]


def _ask_nodes(storage: Storage, compute: ComputeConfig) -> list[DoctorCheck]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote(num_cpus=0, max_retries=0)(check_machine)
    requests = [(node["NodeManagerAddress"],
                 remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(
                     node["NodeID"], soft=False)).remote(
                         f"node {node['NodeManagerAddress']}", storage, compute,
                         int(node["Resources"].get("GPU", 0))))
                for node in ray.nodes() if node["Alive"]]
    checks: list[DoctorCheck] = []
    for address, reference in requests:
        try:
            checks += ray.get(reference, timeout=NODE_SECONDS)
        except Exception as error:  # any error of the node is the result of the check
            checks.append(DoctorCheck(f"node {address}", "answers", False, _short(error),
                                "check that the node's raylet runs and that partialhn is "
                                "installed there"))
    return checks


def _run_check(place: str, what: str, check: Callable[[], str], remedy: str) -> DoctorCheck:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            return DoctorCheck(place, what, True, pool.submit(check).result())
        except Exception as error:  # any error is the result of the check
            return DoctorCheck(place, what, False, _short(error), remedy)


def _storage(storage: Storage) -> str:
    """Tries put, get, list, conditional put and delete in a temporary folder of the storage."""
    storage.check()
    folder = storage.path(".doctor", uuid.uuid4().hex)
    path, content = f"{folder}/probe", uuid.uuid4().hex
    try:
        if not storage.put_if_absent(path, content.encode()):
            raise RuntimeError(f"a conditional write of the new file {path} was refused")
        if storage.put_if_absent(path, b"another"):
            raise RuntimeError("a conditional write replaced an existing file: this service does "
                               "not honour If-None-Match, so two writers would overwrite each "
                               "other")
        if storage.read_text(path) != content:
            raise RuntimeError(f"{path} reads differently from what was written")
        if [file.path for file in storage.list(folder)] != [path]:
            raise RuntimeError(f"{folder} does not list the file that was written")
    finally:
        storage.delete(folder)
    if storage.stat(path) is not None:
        raise RuntimeError(f"{path} still exists after it was deleted")
    return f"{storage.uri}: put, get, list, conditional put, delete"


def _clock(storage: Storage) -> str:
    before = time.time()
    skew = storage.now() - (before + time.time()) / 2
    if abs(skew) > MAX_SKEW:
        raise RuntimeError(f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the "
                           f"storage's; allowed: {MAX_SKEW:.0f} s")
    return f"{abs(skew):.1f} s from the storage's"


def _packages() -> str:
    found = [f"{name} {metadata.version(name)}" for name in PACKAGES]
    return ", ".join([*found, f"python {platform.python_version()}"])


def _environment(compute: ComputeConfig) -> str:
    """The variables of other libraries that are set and touch an option of ours."""
    check_threads(compute.threads)
    return "; ".join(f"{name}={mask_password(value)} {variable.effect} ({variable.option})"
                     for name, value, variable in set_variables()) or "no variable that matters"


def _gpus(counted: int) -> str:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if len(names) < counted:
        raise RuntimeError(f"Ray counts {counted}, PyTorch {torch.__version__} finds {len(names)}")
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


def fields(checks: Sequence[DoctorCheck]) -> dict[str, Any]:
    """The checks as plain values for JSON."""
    return {"passed": all(check.passed for check in checks),
            "checks": [dataclasses.asdict(check) for check in checks]}
