"""The commands `partialhn serve` and `partialhn drift`."""

import dataclasses
from typing import TYPE_CHECKING, Any

from partialhn.config import DeviceName
from partialhn.errors import InputError
from pipelines.settings import RetrainConfig

if TYPE_CHECKING:
    from pipelines.serving.drift import DriftReport

DRIFTS = 3
"""Exit code of `drift` if a task drifts."""


@dataclasses.dataclass(frozen=True)
class Serve:
    """Serve a registered model over HTTP; when its alias moves, switch without losing a request.

    POST /predict takes an image (task in ?task= or the header X-Task; auto infers it) or JSON with
    base64 images; GET /healthz and /metrics report the state. Stop it with Ctrl-C or SIGTERM.
    """

    model: str
    """Model: models:/NAME@champion, models:/NAME@task-TASK or models:/NAME/VERSION."""
    port: int = 8000
    """Port to listen on."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all addresses of this machine. There is no authentication,
    so put a gateway in front of any address other than the default."""
    storage: str = "partialhn-store"
    """The storage that train was given, with the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    reload_seconds: float = 10.0
    """Seconds between two checks of the version that the alias points to."""
    threads: int = 1
    """CPU threads that compute a batch."""
    device: DeviceName = "cpu"
    """Where batches are computed: cpu, gpu, or auto (a GPU if the cluster has one)."""
    max_body_bytes: int = 8 << 20
    """Largest body of a request, in bytes; larger ones are refused (413)."""
    max_image_pixels: int = 25_000_000
    """Largest image in pixels; larger ones are refused before they are decoded (400)."""
    max_waiting: int = 128
    """Largest number of images that wait or are in progress; others are refused (503)."""
    record: bool = True
    """Keep a bounded sample of trunk features (no images) in the storage, for drift."""
    ray_address: str | None = None
    """Cluster to join (auto, ray://host:10001); default: a local one for this server."""

    def __post_init__(self) -> None:
        for key, low, high in (("port", 1, 65535), ("threads", 1, 1024), ("max_waiting", 1, 10_000),
                               ("reload_seconds", 0.1, 86_400), ("max_body_bytes", 1, 1 << 30),
                               ("max_image_pixels", 64, 1 << 31)):
            if not low <= getattr(self, key) <= high:
                raise InputError(f"{key} is {getattr(self, key)}; allowed: {low} to {high}")

    def run(self) -> None:
        from pipelines.serving.app import ServeOptions, serve_model
        from pipelines.serving.http import Limits
        from pipelines.serving.model import RegistrySource

        limits = Limits(body_bytes=self.max_body_bytes, pixels=self.max_image_pixels,
                        waiting=self.max_waiting, images=min(Limits.images, self.max_waiting))
        serve_model(RegistrySource(self.model, self.storage, self.tracking_uri),
                    ServeOptions(self.host, self.port, self.reload_seconds, self.threads, limits,
                                 device=self.device),
                    self.record, self.ray_address)


@dataclasses.dataclass(frozen=True)
class Drift:
    """Test whether the images that a stream's champion gets differ from its held-out images.

    Uses the features that serve, or predict --record, recorded. Exit codes: 0 no drift, 3 a task
    drifts or a new task seems to be here.
    """

    name: str
    """Name of the stream."""
    storage: str = "partialhn-store"
    """The storage that train was given, with features, records and the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    alpha: float = 0.01
    """Probability of a false alarm, for all tasks together."""
    hours: float = 168.0
    """Use images of the last so many hours."""
    new_task_share: float = 0.2
    """Share of images of no known task, of all images, above which a new task seems to be here."""
    json: bool = False
    """Print JSON instead of a table."""
    retrain: bool = False
    """If a task drifts, start one pass of retrain, which learns the tasks in the inbox."""
    propose: bool = False
    """If a new task seems to be here, open a folder for it in the inbox, with a note and without
    images. Nothing is learned until labelled images and _READY are in it."""

    def run(self) -> int:
        import json

        from pipelines.serving.drift import find_drift, table

        report = find_drift(self.name, self.storage, self.tracking_uri, alpha=self.alpha,
                            hours=self.hours, new_task_share=self.new_task_share)
        print(json.dumps(report.fields(), indent=1) if self.json else "\n".join(table(report)))
        if self.propose:
            self._propose(report)
        if report.drifts and self.retrain:
            self._retrain()
        return DRIFTS if report.drifts or report.new_task else 0

    def _propose(self, report: "DriftReport") -> None:
        import sys

        from pipelines.platform.storage import open_storage
        from pipelines.retrain.proposal import WHAT_TO_DO, propose

        folder = propose(open_storage(self.storage), self.name, report)
        if folder is not None:
            print(f"proposed: {folder}; {WHAT_TO_DO}",
                  file=sys.stderr if self.json else sys.stdout)

    def _retrain(self) -> None:
        import sys

        from pipelines.retrain.run import retrain

        out = sys.stderr if self.json else sys.stdout
        settings = RetrainConfig(name=self.name, storage=self.storage,
                                 tracking_uri=self.tracking_uri)
        done = retrain(settings, lambda text: print(text, file=out))
        print("\n".join(done.lines()), file=out)


COMMANDS: dict[str, Any] = {"serve": Serve, "drift": Drift}
