"""The server: a Ray Serve application around one model, for images of any of its tasks.

    request -> checks (http) -> queue -> batch of mixed tasks -> trunk once, heads by task -> reply

While one batch is computed, the next one collects requests, so no request waits for a batch to
fill. `pipelines.serving.http` handles HTTP, `pipelines.serving.model` holds the model and replaces
it when its alias moves, and `pipelines.serving.live` keeps a sample of features for `drift`.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from partialhn.config import DeviceName
from partialhn.errors import InputError
from partialhn.networks.precision import configure_torch
from partialhn.predict import Answer
from pipelines.features.on_ray import without_lines
from pipelines.platform.cluster import start_ray
from pipelines.platform.storage import open_storage
from pipelines.registry.client import connect
from pipelines.serving.http import Limits, Metrics, Reply, Traffic, build_app
from pipelines.serving.live import FeatureRecorder
from pipelines.serving.model import ModelSource, RegistrySource, ServedModel, served_on
from pipelines.serving.watcher import Watcher, address, healthz

ID_DIGITS = 16
"""Digits of an image's SHA-256 that name it where it belongs to no known task."""
MAX_BATCH = 64
"""Largest number of images in one batch."""
HARMLESS = "Task ServeController.graceful_shutdown failed"
"""Part of a warning at every shutdown; harmless: the controller ends before it can reply."""
DRAIN_SECONDS = 20.0
"""Seconds that requests in progress have to finish when the server is stopped."""
LINGER_SECONDS = 0.5
"""Seconds that the last replies have to pass the proxy, which ends without waiting for them."""


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """The options of the server."""

    host: str = "127.0.0.1"
    port: int = 8000
    reload_seconds: float = 10.0
    """Seconds between two checks of the alias in the registry."""
    threads: int = 1
    """CPU threads that compute a batch."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    record: tuple[str, str] | None = None
    """Storage and stream for the sample of features; None records nothing."""
    device: DeviceName = "cpu"
    """Where batches are computed; auto: on a GPU if the cluster has one."""


class Server:
    """The replica of Ray Serve: the HTTP application, the batches, and the model."""

    def __init__(self, source: ModelSource, options: ServeOptions) -> None:
        configure_torch(options.threads)
        self.limits, self.metrics, self.traffic = options.limits, Metrics(), Traffic()
        self.model = ServedModel(source, options.reload_seconds)
        self.recorder = (FeatureRecorder(open_storage(options.record[0]), options.record[1])
                         if options.record else None)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "batch")

    def __serve_build_asgi_app__(self) -> Starlette:
        return build_app(self)

    async def ask(self, image: bytes, task: str) -> Reply:
        """Predicts an image, in one batch with other requests of the same time."""
        reply: Reply = await self._gather((image, task))
        return reply

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0)
    async def _gather(self, requests: list[tuple[bytes, str]]) -> list[Reply]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._answer, requests)

    def _answer(self, requests: list[tuple[bytes, str]]) -> list[Reply]:
        images, tasks = zip(*requests, strict=True)
        batch = self.model.answer(images, tasks, self.limits.pixels)
        self.metrics.batch.observe(len(requests))
        for answer in batch.answers:
            self.metrics.images.labels(answer.task).inc()
        self.metrics.unknown.inc(sum(answer.label is None for answer in batch.answers))
        if self.recorder and batch.answers:
            answered = [image for image, reply in zip(images, batch.replies, strict=True)
                        if not isinstance(reply, InputError)]
            self.recorder.add(batch.loaded.trunk, batch.z_BCHW, batch.answers,
                              lambda row: hashlib.sha256(answered[row]).hexdigest()[:ID_DIGITS])
        return [(batch.loaded, reply) for reply in batch.replies]

    def check_task(self, task: str) -> None:
        """Raises InputError for a task that the current model does not know or cannot infer."""
        self.model.current.predictor.check_task(task)

    def health(self) -> dict[str, Any]:
        """The body of /healthz."""
        loaded = self.model.current
        accuracy = loaded.predictor.auto_accuracy
        record = self.recorder.state() if self.recorder else None
        return {"status": "stopping" if self.traffic.stopping else "serving",
                "version": loaded.version, "since": loaded.since,
                "age_seconds": round(time.time() - loaded.since, 1),
                "tasks": loaded.predictor.tasks,
                "auto": loaded.predictor.model.inference is not None,
                "auto_accuracy": accuracy._asdict() if accuracy else None,
                "reload": self.model.reload, "recording": record}

    async def drain(self) -> None:
        """Refuses new requests, and returns when those in progress are answered."""
        self.traffic.stopping = True
        end = time.monotonic() + DRAIN_SECONDS
        while self.traffic.requests and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await asyncio.sleep(LINGER_SECONDS)

    def __del__(self) -> None:
        # Serve calls this once, after the last reply
        if hasattr(self, "model"):
            self.model.stop()
            if self.recorder:
                self.recorder.close()


def bind(source: ModelSource, options: ServeOptions) -> serve.Application:
    """The Serve application of a source of models."""
    deployment: Any = serve.deployment(
        serve.ingress()(Server), name="partialhn", num_replicas=1,
        # the server limits the waiting requests itself, so that /healthz still works then
        max_ongoing_requests=options.limits.waiting + 64, max_queued_requests=256,
        backpressure_config={"retry_after_s": 1},
        graceful_shutdown_timeout_s=DRAIN_SECONDS, graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if options.device == "gpu" else 0},
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False))
    bound: serve.Application = deployment.bind(source, options)
    return bound


def application(arguments: dict[str, str]) -> serve.Application:
    """The application for a Serve configuration file: `pipelines.serving.app:application`.

    Arguments: model (models:/NAME@ALIAS), storage, and tracking_uri unless MLFLOW_TRACKING_URI is
    set. The file itself sets host and port. Raises: InputError for an unknown argument.
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
    """Serves a registered model until the process gets SIGINT or SIGTERM.

    Raises: InputError for an unknown model, or a port that is in use.
    """
    registry = connect(open_storage(source.storage), source.tracking_uri, create=False)
    source = _absolute(source, registry.tracking_uri)
    version = registry.resolve(source.uri)
    registry.require_sound(version)
    for line in registry.warnings(source.uri):
        log(line)
    _check_port(options.host, options.port)
    if record:
        options = dataclasses.replace(options, record=_record(source))
    log(f"{version.uri} (task {version.task!r}): files as registered; starting Ray")
    start_ray(ray_address)
    device = served_on(options.device, cluster_gpus())
    source = dataclasses.replace(source, device=device)
    options = dataclasses.replace(options, device=device)
    log("loading the model and testing it")
    with running(bind(source, options), options, end_ray=True):
        log(f"serving {version.uri} ({source.uri}) at "
            f"{address(options.host, options.port)}/predict (also /healthz, /metrics); stop with "
            "Ctrl-C or SIGTERM")
        watcher = Watcher(healthz(options.host, options.port), str(version.version), log)
        watcher.say_accuracy()
        _wait_for_signal(watcher, options.reload_seconds)
        log("stopping: requests in progress are completed first")


def cluster_gpus() -> float:
    """GPUs of the cluster that this process belongs to."""
    return float(ray.cluster_resources().get("GPU", 0))


@contextlib.contextmanager
def running(app: serve.Application, options: ServeOptions, end_ray: bool = False) -> Any:
    """A context in which Ray Serve runs the application; Ray must be started already.

    At its end requests in progress are answered and new ones refused. end_ray: this process leaves
    Ray, too.
    """
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="HeadOnly", logging_config=quiet,
                http_options={"host": options.host, "port": options.port})
    try:
        try:
            handle: Any = serve.run(app, name="partialhn", route_prefix="/", logging_config=quiet)
        except RuntimeError as error:  # its text is that of every error of the replica
            raise InputError(f"the server did not start: {_last_reason(error)}; allowed: a model "
                             "that `partialhn models verify` finds as registered") from error
        yield
        with contextlib.suppress(Exception):  # a replica that has died has nothing in progress
            handle.drain.remote().result(timeout_s=DRAIN_SECONDS + 2 * LINGER_SECONDS + 5)
    finally:
        # Ray prints errors of its own actors to stdout, where this process says nothing more
        with without_lines(HARMLESS), contextlib.redirect_stdout(io.StringIO()):
            serve.shutdown()
            if end_ray:
                ray.shutdown()  # waits for lines that are still on their way


def _absolute(source: RegistrySource, tracking_uri: str) -> RegistrySource:
    """The same source with absolute paths, for a process with another working folder.

    The address of a tracking server is not replaced, because the registry's may contain a password
    from this process's environment; the cluster has its own.
    """
    storage = open_storage(source.storage)
    return dataclasses.replace(
        source, storage=storage.root if storage.is_local else source.storage,
        tracking_uri=tracking_uri if tracking_uri.startswith("sqlite") else source.tracking_uri)


def _record(source: RegistrySource) -> tuple[str, str]:
    return source.storage, source.uri.removeprefix("models:/").partition("@")[0].partition("/")[0]


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"port {port} of {host} cannot be used: {error.strerror}; allowed: a "
                             "free port and an address of this machine") from error


def _last_reason(error: Exception) -> str:
    """The line of a replica's traceback that names its error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines or [type(error).__name__])[-1][:400]


def _wait_for_signal(watcher: Watcher, seconds: float) -> None:
    stop = threading.Event()
    earlier_handlers = {number: signal.signal(number, lambda *_: stop.set())
                        for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stop.wait(seconds):
            watcher.look()
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)


__all__ = ["Answer", "ServeOptions", "Server", "application", "bind", "running", "serve_model"]
