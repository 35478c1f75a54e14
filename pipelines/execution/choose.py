"""Where the stages of a run are done: in this process, or on Ray where there is work to share."""

from partialhn.config import Config
from pipelines.execution.base import Execution
from pipelines.platform.cluster import needs_ray, start_ray
from pipelines.platform.progress import Progress
from pipelines.platform.storage import Storage


def open_execution(config: Config, storage: Storage, stream: str, progress: Progress) -> Execution:
    """The stages of a stream's run; starts or joins Ray where they need it, and else imports none.

    Raises: InputError for a cluster that does not answer, or a device that is not there.
    """
    if needs_ray(config.compute):
        from pipelines.execution.on_ray import RayExecution

        start_ray(config.compute.ray_address)
        return RayExecution(config, storage, stream, progress)
    from pipelines.execution.local import LocalExecution

    return LocalExecution(config, storage, stream, progress)
