"""The HTTP interface of the server: requests, refusals, health and metrics.

    POST /predict    an encoded image, task in ?task= or the header X-Task; or JSON
                     {"images": [base64, ...], "task": NAME} or {..., "tasks": [NAME, ...]}
    GET  /healthz    model version, its age, tasks, and how the last reload went
    GET  /metrics    for Prometheus

A refusal names the problem, the value found and the values allowed: 400 for a malformed request or
image, 404 for an unknown task, 413 for a body that is too large, 503 with Retry-After if the
queue is full, the device has too little memory for a batch, or the server stops. The size of an
image is checked in its header, before it is decoded.
"""

import asyncio
import base64
import binascii
import dataclasses
import json
import time
from collections.abc import Mapping
from typing import Any, Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from partialhn.errors import InputError
from partialhn.networks.device_memory import DeviceMemoryError
from partialhn.predict import Answer
from pipelines.serving.model import Loaded, UnknownTaskError

RETRY_AFTER_SECONDS = 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """The server's limits."""

    body_bytes: int = 8 << 20
    """Largest body of a request, in bytes."""
    images: int = 64
    """Largest number of images in a JSON request."""
    pixels: int = 25_000_000
    """Largest number of pixels of an image, by its header."""
    waiting: int = 128
    """Largest number of images that wait or are in progress; others get 503."""
    waiting_bytes: int = 256 << 20
    """Largest total size of the bodies of all requests in progress, in bytes; one body of the
    largest size is taken in any case."""


@dataclasses.dataclass
class Traffic:
    """The requests to predict that are in progress."""

    requests: int = 0
    images: int = 0
    """Images that wait or are being answered."""
    bytes: int = 0
    """Bytes of bodies received so far."""
    stopping: bool = False
    """Whether new requests are refused, because the server stops."""


class RefusedError(Exception):
    """The refusal of a request, with its HTTP status and its kind for the metrics."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Metrics:
    """The metrics that Prometheus reads, in a registry of the server's own."""

    def __init__(self) -> None:
        self.all = CollectorRegistry()
        self.requests = Counter("partialhn_requests", "Requests to predict", registry=self.all)
        self.errors = Counter("partialhn_errors", "Requests refused or failed", ["kind"],
                              registry=self.all)
        self.images = Counter("partialhn_images", "Images answered", ["task"], registry=self.all)
        self.unknown = Counter("partialhn_unknown_images",
                               "Images that seemed to be of no known task", registry=self.all)
        self.seconds = Histogram("partialhn_request_seconds", "Seconds from request to answer",
                                 buckets=(.002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5),
                                 registry=self.all)
        self.batch = Histogram("partialhn_batch_images", "Images answered in one batch",
                               buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=self.all)
        self.waiting = Gauge("partialhn_waiting_images", "Images waiting or being answered",
                             registry=self.all)
        self.version = Gauge("partialhn_model_version", "Version of the model in use",
                             registry=self.all)
        self.since = Gauge("partialhn_model_since_seconds", "When it began to serve, Unix time",
                           registry=self.all)


Reply = tuple[Loaded, Answer | InputError]


class Service(Protocol):
    """The functions of the server that the HTTP interface uses."""

    limits: Limits
    metrics: Metrics
    traffic: Traffic

    async def ask(self, image: bytes, task: str) -> Reply:
        """Predicts an image, in one batch with other requests of the same time."""
        ...

    def check_task(self, task: str) -> None:
        """Raises InputError for a task that the current model does not know or cannot infer."""
        ...

    def health(self) -> dict[str, Any]:
        """The body of /healthz."""
        ...


def build_app(service: Service) -> Starlette:
    """The ASGI application around a service."""
    front = _Front(service)
    return Starlette(routes=[Route("/predict", front.predict, methods=["POST"]),
                             Route("/healthz", front.healthz, methods=["GET"]),
                             Route("/metrics", front.show_metrics, methods=["GET"])])


class _Front:
    """The handlers of the three routes."""

    def __init__(self, service: Service) -> None:
        self.service, self.traffic = service, service.traffic

    async def healthz(self, _: Request) -> Response:
        return JSONResponse(self.service.health())

    async def show_metrics(self, _: Request) -> Response:
        health, metrics = self.service.health(), self.service.metrics
        metrics.waiting.set(self.traffic.images)
        metrics.version.set(int(health["version"]) if str(health["version"]).isdecimal() else 0)
        metrics.since.set(health["since"])
        return Response(generate_latest(metrics.all), media_type=CONTENT_TYPE_LATEST)

    async def predict(self, request: Request) -> Response:
        metrics, start = self.service.metrics, time.perf_counter()
        metrics.requests.inc()
        self.traffic.requests += 1
        try:
            response = await self._predict(request)
        except RefusedError as refused:
            metrics.errors.labels(refused.kind).inc()
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if refused.status == 503 else None
            response = JSONResponse({"error": str(refused)}, refused.status, headers)
        except ClientDisconnect:
            metrics.errors.labels("disconnected").inc()
            response = Response(status_code=400)
        except Exception:
            metrics.errors.labels("failed").inc()
            raise
        finally:
            self.traffic.requests -= 1
        metrics.seconds.observe(time.perf_counter() - start)
        return response

    async def _predict(self, request: Request) -> Response:
        limits, traffic = self.service.limits, self.traffic
        if traffic.stopping:
            raise RefusedError(503, "stopping", "the server stops; ask another one, or again when "
                               "it is back")
        received = 0
        try:
            body = bytearray()
            _check_length(request.headers, limits)
            async for chunk in request.stream():
                received, traffic.bytes = received + len(chunk), traffic.bytes + len(chunk)
                if received > limits.body_bytes:
                    raise _too_large(f"more than {limits.body_bytes}", limits)
                if traffic.bytes > max(limits.waiting_bytes, limits.body_bytes):
                    raise _busy()
                body += chunk
            return await self._answer(request, bytes(body))
        finally:
            traffic.bytes -= received

    async def _answer(self, request: Request, body: bytes) -> Response:
        kind = request.headers.get("content-type", "").lower()
        as_json = kind.startswith(JSON_TYPE)
        if kind.startswith("multipart/"):
            raise RefusedError(400, "malformed", "the body is a form with parts; allowed: the "
                               f"bytes of one image alone, or with the type {JSON_TYPE} "
                               + JSON_FORM)
        if not as_json and body.lstrip()[:1] == b"{":
            raise RefusedError(400, "malformed", "the body looks like JSON, but its Content-Type "
                               f"is {kind or 'missing'}; allowed: {JSON_TYPE} for JSON")
        if as_json:
            images, tasks = read_json(body, self.service.limits)
        else:
            images, tasks = [body], [_task_of(request)]
        for task in dict.fromkeys(tasks):
            try:
                self.service.check_task(task)
            except InputError as error:
                raise RefusedError(404, "unknown task", str(error)) from error
        if self.traffic.images + len(images) > self.service.limits.waiting:
            raise _busy()
        self.traffic.images += len(images)
        try:
            replies = await asyncio.gather(*map(self.service.ask, images, tasks))
        except DeviceMemoryError as error:
            raise RefusedError(503, "no memory", str(error)) from error
        finally:
            self.traffic.images -= len(images)
        for number, (_, reply) in enumerate(replies):
            if isinstance(reply, UnknownTaskError):  # the model was replaced meanwhile
                raise RefusedError(404, "unknown task", str(reply))
            if isinstance(reply, InputError):
                name = f"image number {number}: " if as_json else ""
                raise RefusedError(400, "bad image", f"{name}{reply}")
        answers = [dataclasses.asdict(reply) for _, reply in replies
                   if not isinstance(reply, InputError)]
        version = replies[-1][0].version
        return JSONResponse({"predictions": answers, "version": version} if as_json
                            else answers[0] | {"version": version})


def read_json(body: bytes, limits: Limits) -> tuple[list[bytes], list[str]]:
    """The images of a JSON request and their tasks. Raises: RefusedError if it is malformed."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "malformed", f"the body is not JSON ({error}); allowed: "
                           + JSON_FORM) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("images"), list):
        raise RefusedError(400, "malformed", "the body has no list of images; allowed: "
                           + JSON_FORM)
    encoded = fields["images"]
    if not 1 <= len(encoded) <= limits.images:
        raise RefusedError(400, "malformed", f"the request has {len(encoded)} images; allowed: 1 "
                           f"to {limits.images}")
    tasks = fields.get("tasks", [fields.get("task")] * len(encoded))
    if (not isinstance(tasks, list) or len(tasks) != len(encoded)
            or not all(isinstance(task, str) for task in tasks)):
        raise RefusedError(400, "malformed", "the request has no task for every image; allowed: "
                           + JSON_FORM)
    images = []
    for number, text in enumerate(encoded):
        try:
            images.append(base64.b64decode(text, validate=True))
        except (binascii.Error, TypeError, ValueError) as error:
            raise RefusedError(400, "malformed", f"image number {number} is not base64 ({error}); "
                               f"allowed: {JSON_FORM}") from error
    return images, tasks


JSON_TYPE = "application/json"
JSON_FORM = '{"images": [BASE64, ...], "task": NAME} or {"images": [...], "tasks": [NAME, ...]}'


def _task_of(request: Request) -> str:
    task = request.query_params.get("task") or request.headers.get("x-task")
    if not task:
        raise RefusedError(400, "malformed", "the request names no task; allowed: ?task=NAME or "
                           "the header X-Task, where auto infers it")
    return task


def _check_length(headers: Mapping[str, str], limits: Limits) -> None:
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.body_bytes:
        raise _too_large(length, limits)


def _too_large(found: str, limits: Limits) -> RefusedError:
    return RefusedError(413, "too large", f"the body has {found} bytes; allowed: up to "
                        f"{limits.body_bytes}")


def _busy() -> RefusedError:
    return RefusedError(503, "queue full", f"too many requests are waiting; try again in "
                        f"{RETRY_AFTER_SECONDS} s")
