"""Measurements of earlier tasks that still hold, so that they are not repeated.

The accuracy of a task cannot change while three things stay: the tensors that determine its
answers, the stored features that it is tested on, and the code. A record keeps a hash of the three,
its *grounds*, for every task that was measured. A few tasks are measured again all the same; if one
of them differs, then all are.
"""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

import partialhn
from partialhn.features.feature_set import FeatureSet
from partialhn.naming import digest
from partialhn.strategies import Strategy
from partialhn.training.answers import evaluate
from partialhn.training.records import TaskRecord

SAMPLE = 3
"""Earlier tasks that are measured again after every task."""
DECIDING = ("features", "networks", "strategies", "training/experience.py")
"""Parts of the library that decide on an answer."""
LENGTH = 16
"""Digits of grounds."""


def accuracy_row(strategy: Strategy, tests: Sequence[FeatureSet], finished: Sequence[TaskRecord],
                 known: list[str | None] | None = None, *, re_evaluate: bool = False
                 ) -> tuple[tuple[float, ...], dict[str, str]]:
    """Accuracy on the test images of every task so far, and the grounds of those measured now.

    finished: the records of the tasks before the last one. known: the grounds of the first tasks
    as they were after an earlier task of this process; those of the others are added.
    re_evaluate: measure every task.
    """
    newest = len(tests) - 1
    grounds = [] if known is None else known
    grounds += [_grounds(strategy, task, tests[task]) for task in range(len(grounds), newest + 1)]
    held = {} if re_evaluate else _held(grounds[:newest], finished)
    again = _sample(sorted(held), newest)
    found = {task: evaluate(strategy, task, tests[task])
             for task in range(newest + 1) if task not in held or task in again}
    if any(found[task] != held[task] for task in again):
        found |= {task: evaluate(strategy, task, tests[task]) for task in held if task not in again}
    row = tuple(found.get(task, held.get(task, 0.0)) for task in range(newest + 1))
    return row, {str(task): ground for task in sorted(found)
                 if (ground := grounds[task]) is not None}


def _held(grounds: Sequence[str | None], finished: Sequence[TaskRecord]) -> dict[int, float]:
    """The accuracies that were measured on the same grounds, by task."""
    known: dict[int, tuple[str, float]] = {}
    for record in finished:
        for text, ground in (record.measured or {}).items():
            known[int(text)] = ground, record.accuracy_row[int(text)]
    return {task: known[task][1] for task, ground in enumerate(grounds)
            if ground is not None and task in known and known[task][0] == ground}


def _sample(tasks: Sequence[int], newest: int) -> list[int]:
    """A few of the tasks; as the stream grows, each has its turn."""
    count = min(SAMPLE, len(tasks))
    return [tasks[(newest * SAMPLE + place) % len(tasks)] for place in range(count)]


def _grounds(strategy: Strategy, task: int, test: FeatureSet) -> str | None:
    """The grounds of a measurement; None where a later task may change the answers."""
    answers = strategy.answers_by(task)
    if answers is None:
        return None
    device = next(strategy.parameters()).device.type
    return digest([answers, list(test.keys), strategy.head.precision, device, code_version()],
                  LENGTH)


@functools.cache
def code_version() -> str:
    """A hash of the code that decides on an answer, and of PyTorch's version."""
    root = Path(partialhn.__file__).parent
    found = hashlib.sha256(f"{partialhn.__version__} {torch.__version__}".encode())
    for part in DECIDING:
        for file in sorted((root / part).rglob("*.py")) if (root / part).is_dir() else [
                root / part]:
            found.update(file.read_bytes())
    return found.hexdigest()
