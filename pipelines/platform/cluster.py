"""Ray: decides whether a run needs it, and starts or joins it from this process."""

import os
import socket
import sys
from typing import Any

from partialhn.config import ComputeConfig
from partialhn.errors import InputError

LOCAL = "local"
"""The address that stands for a local Ray which only this process uses."""
START_ATTEMPTS = 3
"""How often Ray is started: it gives a node 30 s to come up, but a busy machine may need longer."""


def needs_ray(compute: ComputeConfig) -> bool:
    """Whether a run needs Ray: it has an address, several workers, or Ray is started already."""
    several_workers = compute.workers > 1 or compute.feature_workers > 1
    return compute.ray_address is not None or several_workers or _is_started()


def start_ray(address: str | None) -> None:
    """Joins the cluster at an address, or starts a local one that ends with this process.

    Raises: InputError if no cluster answers.
    """
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address in (None, LOCAL):
        options["include_dashboard"] = False
        # a local machine gets no notice of preemption, and the actor that watches costs seconds
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        _reach(address)
        init_ray(address or LOCAL, **options)
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(f"ray_address is {address!r}, but no cluster answers ({error}); allowed: "
                         "auto, ray://host:10001, host:6379, local for a local one, or leave it "
                         "out") from error


def init_ray(address: str, **options: Any) -> None:
    """Starts or joins Ray; tries again if a node did not come up in time."""
    import ray

    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(address, **options)
            return
        except Exception as error:  # Ray has no exception class of its own for this
            if "timed out during startup" not in str(error) or attempt + 1 == START_ATTEMPTS:
                raise
            ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises OSError if nothing listens at host:port; Ray itself would try for many minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def _is_started() -> bool:
    """Whether this process has started or joined Ray; does not import it."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()
