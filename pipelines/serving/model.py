"""The model a server answers with: loaded by alias, exchanged while it serves, never half.

A thread asks the registry at an interval which version the alias names. A new one is loaded and
must answer a self-test before it takes the old one's place, which is one assignment: a batch in
progress ends with the model it began with. Where anything fails the old one stays, and health
says so.
"""

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from partialhn.data.decode import decode_images
from partialhn.errors import InputError
from partialhn.predict import Answer, Predictor
from partialhn.task_inference import AUTO
from pipelines.platform.storage import open_storage
from pipelines.registry.client import Registry, connect

log = logging.getLogger("partialhn.serving")
LONGEST_WAIT = 300.0
"""Seconds between tries to load a version that failed, at most; it doubles from the interval."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A predictor with every task's head generated, and what it is."""

    predictor: Predictor
    version: str
    """Of the registered model, for example 7."""
    since: float
    """When it began to serve, in seconds since 1970."""
    trunk: str
    """Fingerprint of the trunk."""


class UnknownTaskError(InputError):
    """A task that the model in use does not know, or cannot infer."""


ASKED = InputError("not answered yet")
"""Stands in a batch's replies until the answer is there."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Replies to a batch, in order, and what was computed for them."""

    loaded: Loaded
    """The model that answered."""
    replies: list[Answer | InputError]
    z_BCHW: torch.Tensor
    """Trunk features of the images that have an answer."""
    answers: list[Answer]
    """Theirs, in the same order."""


class ModelSource(Protocol):
    """Where models come from. Pickles to the server."""

    def newest(self) -> str:
        """The version to serve now."""
        ...

    def load(self) -> tuple[Predictor, str]:
        """That version's predictor, and which it is."""
        ...


@dataclasses.dataclass
class RegistrySource:
    """The version that an alias of the registry names."""

    uri: str
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    storage: str
    tracking_uri: str | None = None
    _registry: Registry | None = dataclasses.field(default=None, repr=False)

    def newest(self) -> str:
        """Asks the registry which version the alias names."""
        return str(self._connected().resolve(self.uri).version)

    def load(self) -> tuple[Predictor, str]:
        """Downloads and reads the version."""
        predictor, version = self._connected().load_predictor(self.uri)
        return predictor, str(version.version)

    def _connected(self) -> Registry:
        if self._registry is None:
            self._registry = connect(open_storage(self.storage), self.tracking_uri, create=False)
        return self._registry

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_registry": None}


class ServedModel:
    """The model in use and the thread that keeps it the newest."""

    def __init__(self, source: ModelSource, interval: float) -> None:
        """Loads the first model. `interval`: seconds between looks at the registry."""
        self.source, self.interval = source, interval
        self.current = self._load()
        self.reload: dict[str, Any] = {"state": "current"}
        """What the last look at the registry brought, for /healthz."""
        self._failures, self._failed_version = 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="alias")
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join(5)

    def answer(self, images: Sequence[bytes], tasks: Sequence[str], max_pixels: int) -> Batch:
        """Answers for a batch of mixed tasks: one trunk pass for all, errors one by one."""
        loaded = self.current
        data = loaded.predictor.model.config.data
        replies: list[Answer | InputError] = [_check(loaded.predictor, task) for task in tasks]
        decoded = decode_images(images, ["sent"] * len(images), data.input_size, on_bad="skip",
                                max_pixels=min(max_pixels, data.max_image_pixels))
        good = decoded.index_B.tolist()
        for place, bad in zip(sorted({*range(len(images))} - {*good}), decoded.bad, strict=True):
            replies[place] = InputError(f"the image {bad.reason}")
        rows = [row for row, place in enumerate(good) if replies[place] is ASKED]
        z_BCHW = loaded.predictor.features(decoded.images_BCHW[rows], exact=False)
        answers = loaded.predictor.answers(z_BCHW, [tasks[good[row]] for row in rows])
        for row, answer in zip(rows, answers, strict=True):
            replies[good[row]] = answer
        return Batch(loaded, replies, z_BCHW, answers)

    def _watch(self) -> None:
        while not self._stop.wait(self._pause()):
            try:
                self._look()
            except Exception as error:  # whatever the registry raises: the old model serves on
                self._failures += 1
                self.reload = {"state": "failed", "error": f"{type(error).__name__}: {error}",
                               "failures": self._failures, "at": time.time()}
                log.warning("model %s stays: %s", self.current.version, error)

    def _pause(self) -> float:
        return float(min(self.interval * 2 ** min(self._failures, 10),
                         max(LONGEST_WAIT, self.interval)))

    def _look(self) -> None:
        wanted = self.source.newest()
        if wanted != self.current.version:
            self.reload = {"state": "loading", "version": wanted}
            new = self._load()
            old, self.current = self.current, new
            log.info("model %s takes the place of %s", new.version, old.version)
        self._failures, self.reload = 0, {"state": "current", "at": time.time()}

    def _load(self) -> Loaded:
        predictor, version = self.source.load()
        self_test(predictor)
        return Loaded(predictor, version, time.time(), predictor.model.trunk.fingerprint())


def self_test(predictor: Predictor) -> None:
    """Generates every task's head and has it answer, in one batch of all tasks.

    Raises: InputError where an answer is no probability.
    """
    size = predictor.model.config.data.input_size
    tasks = predictor.tasks + [AUTO] * (predictor.model.inference is not None)
    images_BCHW = torch.randint(0, 256, (len(tasks), 3, size, size), dtype=torch.uint8,
                                generator=torch.Generator().manual_seed(0))
    answers = predictor.answers(predictor.features(images_BCHW, exact=False), tasks)
    for task, answer in zip(tasks, answers, strict=True):
        total = sum(answer.probabilities)
        if not math.isclose(total, 1, abs_tol=1e-3):
            raise InputError(f"the model fails its self-test: probabilities of task {task!r} sum "
                             f"to {total}; allowed: 1")


def _check(predictor: Predictor, task: str) -> InputError:
    """ASKED, or what is wrong with the task."""
    try:
        predictor.check_task(task)
    except InputError as error:
        return UnknownTaskError(str(error))
    return ASKED
