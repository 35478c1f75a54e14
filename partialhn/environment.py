"""Environment variables of the libraries beneath that touch an option of ours, in one table.

An explicit option wins over a variable, or the run is refused where it cannot. The effects of
MLflow's database, S3 and OpenMP variables were found by running them; those of Ray, of an MLflow
server, of Hugging Face and of CUDA and NVIDIA (no GPU was at hand) by reading. `partialhn
doctor` shows the variables that are set.
"""

import dataclasses
import os
from collections.abc import Mapping

from partialhn.errors import InputError


@dataclasses.dataclass(frozen=True)
class Variable:
    """A variable, the option that it touches, and which of the two counts."""

    names: tuple[str, ...]
    option: str
    effect: str


VARIABLES = (
    Variable(("MLFLOW_TRACKING_URI",), "tracking_uri", "counts where tracking_uri is not given"),
    Variable(("MLFLOW_REGISTRY_URI",), "tracking_uri",
             "is not used: versions lie where runs lie"),
    Variable(("MLFLOW_ENABLE_WORKSPACES",), "tracking_uri",
             "is refused with a database, which processes without it could not open any more"),
    Variable(("MLFLOW_WORKSPACE",), "tracking_uri", "chooses the workspace of an MLflow server"),
    Variable(("MLFLOW_S3_ENDPOINT_URL", "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"), "storage",
             "is not used where the storage names an endpoint, and refused where it names none; a "
             "server may have a bucket of its own"),
    Variable(("MLFLOW_ENABLE_ASYNC_LOGGING",), "tracking_uri",
             "is not used: what is logged is there when a command ends"),
    Variable(("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"),
             "storage", "counts where the storage names no endpoint or region"),
    Variable(("AWS_CA_BUNDLE", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy",
              "NO_PROXY", "no_proxy"), "storage", "counts for every access to S3"),
    Variable(("RAY_ADDRESS",), "ray_address", "counts with ray_address auto only"),
    Variable(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "threads",
             "counts where threads is not given"),
    Variable(("OMP_THREAD_LIMIT", "OMP_DYNAMIC"), "threads",
             "leaves fewer threads than PyTorch reports, so it is refused where threads asks for "
             "more"),
    Variable(("NVIDIA_TF32_OVERRIDE",), "precision, trunk_arithmetic",
             "0 lets no GPU use TF32, and is refused with trunk_arithmetic tf32; other values are "
             "not used"),
    Variable(("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",), "precision",
             "is not used: float32 stays float32"),
    Variable(("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"), "seed",
             "changes the last digits, so that a seed gives other weights"),
    Variable(("CUDA_DEVICE_MAX_CONNECTIONS",), "tasks_at_once",
             "counts, up to 32; with fewer than tasks_at_once, tasks wait for each other on a GPU"),
    Variable(("CUDA_VISIBLE_DEVICES",), "device", "hides GPUs; device gpu is refused without one"),
    Variable(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_ENDPOINT", "HF_HOME"), "data, trunk",
             "says where hf: and hf-hub: names are looked for"),
)
"""Every variable that was found to matter."""


def set_variables(environment: Mapping[str, str] = os.environ) -> list[tuple[str, str, Variable]]:
    """Name, value and meaning of the variables that are set here."""
    return [(name, environment[name], variable) for variable in VARIABLES
            for name in variable.names if environment.get(name)]


def check_threads(threads: int | None, environment: Mapping[str, str] = os.environ) -> None:
    """Raises InputError where OpenMP would run fewer threads than the option asks for.

    PyTorch takes the number and reports it, and OpenMP uses less of it.
    """
    if threads is None:
        return
    limit = environment.get("OMP_THREAD_LIMIT", "")
    if limit.isdecimal() and int(limit) < threads:
        raise InputError(f"threads is {threads}, but OMP_THREAD_LIMIT is {limit}, and no more "
                         f"would run; allowed: threads up to {limit}, or unset the variable")
    if environment.get("OMP_DYNAMIC", "").strip().lower() == "true" and threads > 1:
        raise InputError(f"threads is {threads}, but OMP_DYNAMIC is true, and fewer would run on a "
                         "busy machine; allowed: threads 1, or unset the variable")


def check_arithmetic(arithmetic: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises InputError where trunk_arithmetic is tf32 and NVIDIA's libraries would not use it."""
    if arithmetic == "tf32" and environment.get("NVIDIA_TF32_OVERRIDE") == "0":
        raise InputError("trunk_arithmetic is 'tf32', but NVIDIA_TF32_OVERRIDE is 0, with which no "
                         "GPU uses it; allowed: ieee or bfloat16, or unset the variable")


def keep_float32(environment: "os._Environ[str]" = os.environ) -> None:
    """Takes away an NVIDIA_TF32_OVERRIDE that would put TF32 in the place of float32, before a CUDA
    library reads it; 0 only forbids TF32, and stays.
    """
    if environment.get("NVIDIA_TF32_OVERRIDE", "0") != "0":
        del environment["NVIDIA_TF32_OVERRIDE"]


def let_streams_overlap(environment: "os._Environ[str]" = os.environ) -> None:
    """Asks CUDA for 32 queues to a GPU instead of 8, before it is started: streams that share a
    queue wait for each other.
    """
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
