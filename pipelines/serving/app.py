"""The server: a Ray Serve application around one model, for images of any of its tasks.

    request -> checks (http) -> queue -> batch of mixed tasks -> trunk once, heads by task
            -> answer; while a batch runs the next one gathers, so nobody waits for company

The walk: `pipelines.serving.http` is the HTTP side, `pipelines.serving.model` holds the model and
exchanges it when its alias moves, `pipelines.serving.live` keeps a sample of features for `drift`.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from partialhn.errors import InputError
from partialhn.networks.precision import configure_torch
from partialhn.predict import Answer
from pipelines.features.on_ray import without_lines
from pipelines.platform.cluster import start_ray
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from pipelines.serving.http import Limits, Metrics, Reply, build_app
from pipelines.serving.live import Recorder
from pipelines.serving.model import ModelSource, RegistrySource, ServedModel

MAX_BATCH = 64
"""Images in one batch."""
HARMLESS = "Task ServeController.graceful_shutdown failed"
"""Said at every end: the controller ends before it can answer that it will."""
DRAIN_SECONDS = 20.0
"""Requests in progress have so long to end when the server is stopped."""


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How a model is served."""

    host: str = "127.0.0.1"
    port: int = 8000
    reload_seconds: float = 10.0
    """Between looks at the registry."""
    threads: int = 1
    """Of a batch's computation."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    record: tuple[str, str] | None = None
    """Storage and stream below which a sample of features is kept; None keeps nothing."""


class Server:
    """What runs in Serve's replica: the HTTP application, the batches, the model."""

    def __init__(self, source: ModelSource, options: ServeOptions) -> None:
        configure_torch(options.threads)
        self.limits, self.metrics = options.limits, Metrics()
        self.model = ServedModel(source, options.reload_seconds)
        self.recorder = (Recorder(open_storage(options.record[0]), options.record[1])
                         if options.record else None)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "batch")

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_app(self)

    async def ask(self, image: bytes, task: str) -> Reply:
        """An answer, in a batch with whoever asks at the same time."""
        reply: Reply = await self._gather((image, task))
        return reply

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0)
    async def _gather(self, asked: list[tuple[bytes, str]]) -> list[Reply]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._answer, asked)

    def _answer(self, asked: list[tuple[bytes, str]]) -> list[Reply]:
        images, tasks = zip(*asked, strict=True)
        batch = self.model.answer(images, tasks, self.limits.pixels)
        self.metrics.batch.observe(len(asked))
        for answer in batch.answers:
            self.metrics.images.labels(answer.task).inc()
        self.metrics.unknown.inc(sum(answer.label is None for answer in batch.answers))
        if self.recorder and batch.answers:
            self.recorder.add(batch.loaded.trunk, batch.z_BCHW, batch.answers)
        return [(batch.loaded, reply) for reply in batch.replies]

    def check_task(self, task: str) -> None:
        """Raises InputError for a task that the model in use cannot answer for."""
        self.model.current.predictor.check_task(task)

    def health(self) -> dict[str, Any]:
        """The body of /healthz."""
        loaded = self.model.current
        record = self.recorder.state() if self.recorder else None
        return {"status": "serving", "version": loaded.version, "since": loaded.since,
                "age_seconds": round(time.time() - loaded.since, 1),
                "tasks": loaded.predictor.tasks,
                "auto": loaded.predictor.model.inference is not None,
                "reload": self.model.reload, "recording": record}

    def __del__(self) -> None:
        # Serve calls it once when the last request has been answered
        if hasattr(self, "model"):
            self.model.stop()
            if self.recorder:
                self.recorder.close()


def bind(source: ModelSource, options: ServeOptions) -> serve.Application:
    """The Serve application of a source of models."""
    deployment: Any = serve.deployment(
        serve.ingress()(Server), name="partialhn", num_replicas=1,
        # what waits is bounded by the server itself, which can still tell its health then
        max_ongoing_requests=options.limits.waiting + 64, max_queued_requests=256,
        backpressure_config={"retry_after_s": 1},
        graceful_shutdown_timeout_s=DRAIN_SECONDS, graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 1},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False))
    bound: serve.Application = deployment.bind(source, options)
    return bound


def application(arguments: dict[str, str]) -> serve.Application:
    """What a Serve configuration file or a RayService names: `pipelines.serving.app:application`.

    Arguments: model (models:/NAME@ALIAS), storage, and tracking_uri unless MLFLOW_TRACKING_URI
    says it. Host and port belong to the file.
    """
    known = {"model", "storage", "tracking_uri"}
    if unknown := arguments.keys() - known:
        raise InputError(f"argument {sorted(unknown)[0]!r} is unknown; allowed: "
                         + ", ".join(sorted(known)))
    source = RegistrySource(arguments["model"], arguments["storage"],
                            arguments.get("tracking_uri"))
    return bind(source, ServeOptions(record=_record(source)))


def serve_model(source: RegistrySource, options: ServeOptions, record: bool = True,
                ray_address: str | None = None, log: Callable[[str], None] = print) -> None:
    """Serves a registered model until the process is told to stop.

    Raises: InputError for an unknown model, or a port that is taken.
    """
    registry = connect(open_storage(source.storage), source.tracking_uri, create=False)
    source = _absolute(source, registry.tracking_uri)
    version = registry.resolve(source.uri)
    _check_port(options.host, options.port)
    if record:
        options = dataclasses.replace(options, record=_record(source))
    start_ray(ray_address)
    with running(bind(source, options), options):
        log(f"{version.uri} of {source.uri} at http://{options.host}:{options.port}/predict "
            "(also /healthz, /metrics); ends with Ctrl-C or SIGTERM")
        _until_told()
        log("stopping: requests in progress are answered first")


@contextlib.contextmanager
def running(app: serve.Application, options: ServeOptions) -> Any:
    """Serve with the application, on a Ray that is there, until the block ends."""
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="HeadOnly", logging_config=quiet,
                http_options={"host": options.host, "port": options.port})
    try:
        serve.run(app, name="partialhn", route_prefix="/", logging_config=quiet)
        yield
    finally:
        with without_lines(HARMLESS):
            serve.shutdown()


def _absolute(source: RegistrySource, tracking_uri: str) -> RegistrySource:
    """The same source for a process in another folder.

    A server's address stays as it was given: it may hold a password, which the environment of
    the cluster has too.
    """
    place = open_storage(source.storage)
    return dataclasses.replace(
        source, storage=place.root if place.is_local else source.storage,
        tracking_uri=tracking_uri if tracking_uri.startswith("sqlite") else source.tracking_uri)


def _record(source: RegistrySource) -> tuple[str, str]:
    return source.storage, source.uri.removeprefix("models:/").partition("@")[0].partition("/")[0]


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"port {port} of {host} cannot be used: {error.strerror}; allowed: a "
                             "free port and an address of this machine") from error


def _until_told() -> None:
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set())
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        told.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Answer", "ServeOptions", "Server", "application", "bind", "running", "serve_model"]
