"""Chooses where the phases of a run execute: in this process, or on Ray for several workers."""

from partialhn.config import Config
from pipelines.execution.base import Execution
from pipelines.platform.cluster import needs_ray, start_ray
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage


def open_execution(config: Config, storage: Storage, stream: str, progress: Progress) -> Execution:
    """The execution of a stream's run; starts or joins Ray only if the configuration needs it.

    Raises: InputError for a cluster that does not answer, or a device that does not exist.
    """
    if needs_ray(config.compute):
        from pipelines.execution.on_ray import RayExecution

        start_ray(config.compute.ray_address)
        return RayExecution(config, storage, stream, progress)
    from pipelines.execution.local import LocalExecution

    return LocalExecution(config, storage, stream, progress)
