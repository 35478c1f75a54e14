"""The model of a server: loaded by its alias and replaced as a whole while the server runs.

A thread regularly asks the registry which version the alias points to. A new version is loaded and
must pass a self-test. Then it replaces the old one in a single assignment, so a batch in progress
ends with the model it began with. If anything fails, the old model stays and /healthz shows the
error.
"""

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from partialhn.config import DeviceName
from partialhn.errors import InputError
from partialhn.networks.precision import choose_device
from partialhn.predict import Answer, Predictor
from partialhn.task_inference import AUTO
from pipelines.platform.storage import open_storage
from pipelines.registry.client import Registry, connect

log = logging.getLogger("partialhn.serving")
LONGEST_WAIT = 300.0
"""Longest pause in seconds after a failure; the pause starts with the interval and doubles."""
TESTED_AT_ONCE = 16
"""Tasks whose heads the self-test runs in one batch: memory does not grow with the tasks."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded model whose heads are all generated, with its version."""

    predictor: Predictor
    version: str
    """Version of the registered model, for example 7."""
    since: float
    """Time when it was loaded, in seconds since 1970."""
    trunk: str
    """Fingerprint of the trunk."""


class UnknownTaskError(InputError):
    """A task that the current model does not know or cannot infer."""


PENDING = InputError("not predicted yet")
"""Placeholder in a batch's replies until the prediction exists."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """The replies to a batch, in order, with the features computed for them."""

    loaded: Loaded
    """The model that was used."""
    replies: list[Answer | InputError]
    z_BCHW: torch.Tensor
    """Trunk features of the images with a prediction."""
    answers: list[Answer]
    """Predictions for the rows of z_BCHW."""


class ModelSource(Protocol):
    """A source of models, which can be pickled to the server."""

    def newest(self) -> str:
        """The version to serve now."""
        ...

    def load(self) -> tuple[Predictor, str]:
        """The predictor of the version to serve now, and that version."""
        ...


@dataclasses.dataclass
class RegistrySource:
    """A source that follows an alias, or takes a fixed version, of the registry."""

    uri: str
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    storage: str
    tracking_uri: str | None = None
    device: DeviceName = "cpu"
    _registry: Registry | None = dataclasses.field(default=None, repr=False)

    def newest(self) -> str:
        """Asks the registry which version the alias points to."""
        return str(self._connected().resolve(self.uri).version)

    def load(self) -> tuple[Predictor, str]:
        """Downloads and loads the version."""
        predictor, version = self._connected().load_predictor(self.uri, choose_device(self.device))
        return predictor, str(version.version)

    def _connected(self) -> Registry:
        if self._registry is None:
            self._registry = connect(open_storage(self.storage), self.tracking_uri, create=False)
        return self._registry

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_registry": None}


def served_on(wanted: DeviceName, gpus: float) -> DeviceName:
    """Cpu or gpu, for a cluster with so many GPUs.

    Raises: InputError if a GPU is required and the cluster has none.
    """
    if wanted == "gpu" and gpus < 1:
        raise InputError("device is 'gpu', but the cluster has no GPU; allowed: auto, cpu, or gpu "
                         "in a cluster with one")
    return "gpu" if wanted != "cpu" and gpus >= 1 else "cpu"


class ServedModel:
    """The current model, and the thread that replaces it when its alias moves."""

    def __init__(self, source: ModelSource, interval: float) -> None:
        """Loads the first model. interval: seconds between two checks of the registry."""
        self.source, self.interval = source, interval
        self.current = self._load()
        self.reload: dict[str, Any] = {"state": "current"}
        """Result of the last check of the registry, for /healthz."""
        self._failures, self._failed_version = 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="alias")
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread."""
        self._stop.set()
        self._thread.join(5)

    def answer(self, images: Sequence[bytes], tasks: Sequence[str], max_pixels: int) -> Batch:
        """Predicts a batch of mixed tasks with one run of the trunk; errors become replies."""
        loaded = self.current
        replies: list[Answer | InputError] = [_check(loaded.predictor, task) for task in tasks]
        decoded = loaded.predictor.decode(images, ["sent"] * len(images), "skip", max_pixels)
        good = decoded.index_B.tolist()
        undecoded = sorted({*range(len(images))} - {*good})
        for position, bad in zip(undecoded, decoded.bad, strict=True):
            replies[position] = InputError(f"the image {bad.reason}")
        rows = [row for row, position in enumerate(good) if replies[position] is PENDING]
        z_BCHW = loaded.predictor.features(decoded.images_BCHW[rows], exact=False)
        answers = loaded.predictor.answers(z_BCHW, [tasks[good[row]] for row in rows])
        for row, answer in zip(rows, answers, strict=True):
            replies[good[row]] = answer
        return Batch(loaded, replies, z_BCHW, answers)

    def _watch(self) -> None:
        while not self._stop.wait(self._pause()):
            try:
                self._look()
            except Exception as error:  # whatever the registry raises, the old model stays
                self._failures += 1
                self.reload = {"state": "failed", "error": f"{type(error).__name__}: {error}",
                               "failures": self._failures, "at": time.time()}
                log.warning("still serving version %s, because checking for a new one failed: %s",
                            self.current.version, error)

    def _pause(self) -> float:
        return float(min(self.interval * 2 ** min(self._failures, 10),
                         max(LONGEST_WAIT, self.interval)))

    def _look(self) -> None:
        wanted = self.source.newest()
        if wanted != self.current.version:
            self.reload = {"state": "loading", "version": wanted}
            new = self._load()
            old, self.current = self.current, new
            log.info("now serving version %s instead of %s", new.version, old.version)
        self._failures, self.reload = 0, {"state": "current", "at": time.time()}

    def _load(self) -> Loaded:
        predictor, version = self.source.load()
        self_test(predictor)
        return Loaded(predictor, version, time.time(), predictor.model.trunk.fingerprint())


def self_test(predictor: Predictor) -> None:
    """Generates every task's head and runs it on a random image, a few tasks in a batch.

    Raises: InputError if a task's probabilities do not sum to 1.
    """
    size = predictor.model.config.data.input_size
    tasks = predictor.tasks + [AUTO] * (predictor.model.inference is not None)
    images_BCHW = torch.randint(0, 256, (TESTED_AT_ONCE, 3, size, size), dtype=torch.uint8,
                                generator=torch.Generator().manual_seed(0))
    z_BCHW = predictor.features(images_BCHW[:len(tasks)], exact=False)
    for start in range(0, len(tasks), TESTED_AT_ONCE):
        batch = tasks[start:start + TESTED_AT_ONCE]
        for task, answer in zip(batch, predictor.answers(z_BCHW[:len(batch)], batch), strict=True):
            total = sum(answer.probabilities)
            if not math.isclose(total, 1, abs_tol=1e-3):
                raise InputError(f"the model fails its self-test: probabilities of task {task!r} "
                                 f"sum to {total}; allowed: 1")


def _check(predictor: Predictor, task: str) -> InputError:
    """PENDING for a known task, otherwise the error."""
    try:
        predictor.check_task(task)
    except InputError as error:
        return UnknownTaskError(str(error))
    return PENDING
