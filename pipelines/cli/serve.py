"""Commands of a model in use: serve it, and see whether what it is asked has changed."""

import dataclasses
from typing import Any

from partialhn.errors import InputError
from pipelines.settings import RetrainConfig

DRIFTS = 3
"""Exit code of drift where a task does."""


@dataclasses.dataclass(frozen=True)
class Serve:
    """Answer over HTTP with a registered model, and follow its alias without losing a request.

    POST /predict takes an image (task in ?task= or the header X-Task; auto infers it) or JSON with
    base64 images; GET /healthz and /metrics tell how it is. Ends with Ctrl-C or SIGTERM.
    """

    model: str
    """Model: models:/NAME@champion, models:/NAME@task-TASK or models:/NAME/VERSION."""
    port: int = 8000
    """Port to listen on."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's. There is no authentication: put a
    gateway in front of any other than the default."""
    storage: str = "partialhn-store"
    """The storage that train was given; finds the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    reload_seconds: float = 10.0
    """Seconds between looks at where the alias points."""
    threads: int = 1
    """CPU threads of a batch's computation."""
    max_body_bytes: int = 8 << 20
    """Larger requests are refused (413)."""
    max_image_pixels: int = 25_000_000
    """Larger images are refused by their header, before they are decoded (400)."""
    max_waiting: int = 128
    """Images that wait or are being answered; more are told to come again (503)."""
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
                    ServeOptions(self.host, self.port, self.reload_seconds, self.threads, limits),
                    self.record, self.ray_address)


@dataclasses.dataclass(frozen=True)
class Drift:
    """See whether the images asked of a stream's champion differ from those it was tested on.

    What is compared was recorded by serve, or by predict --record. Exit codes: 0 no drift, 3 a
    task drifts.
    """

    name: str
    """Name of the stream."""
    storage: str = "partialhn-store"
    """The storage that train was given; finds features, records and the default registry."""
    tracking_uri: str | None = None
    """MLflow server or database, as for train."""
    alpha: float = 0.01
    """Chance of a false alarm, over all tasks together."""
    hours: float = 168.0
    """How far back to look, in hours."""
    json: bool = False
    """Print JSON instead of a table."""
    retrain: bool = False
    """Where a task drifts, start one pass of retrain: it learns what has arrived in the inbox."""

    def run(self) -> int:
        import json

        from pipelines.serving.drift import find_drift, table

        found = find_drift(self.name, self.storage, self.tracking_uri, alpha=self.alpha,
                           hours=self.hours)
        print(json.dumps(found.fields(), indent=1) if self.json else "\n".join(table(found)))
        if found.drifts and self.retrain:
            self._retrain()
        return DRIFTS if found.drifts else 0

    def _retrain(self) -> None:
        import sys

        from pipelines.retrain.run import retrain

        out = sys.stderr if self.json else sys.stdout
        settings = RetrainConfig(name=self.name, storage=self.storage,
                                 tracking_uri=self.tracking_uri)
        done = retrain(settings, lambda text: print(text, file=out))
        print("\n".join(done.lines()), file=out)


COMMANDS: dict[str, Any] = {"serve": Serve, "drift": Drift}
