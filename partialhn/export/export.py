"""The export of a task's network, or of all tasks' networks, to one file.

Legend: B batch, C channels, H W spatial.
"""

import dataclasses
import uuid
from pathlib import Path
from typing import Any, Literal

import torch

from partialhn.errors import InputError, IntegrityError
from partialhn.export.formats import FORMATS, Format, Subject
from partialhn.export.library import own_network, why_not
from partialhn.export.network import TaskNetwork, TaskNetworks
from partialhn.export.record import describe
from partialhn.predict import Predictor
from partialhn.task_inference import AUTO

ALL = "all"
"""The task that stands for all tasks in one file."""
TOLERANCE = 1e-4
"""Largest difference of a probability that a file may have from the model's."""
FormatName = Literal["onnx", "torch", "safetensors"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """An exported file, with its record."""

    record: dict[str, Any]
    """The record that stands in the file's metadata, too."""
    difference: float
    """Largest difference of a probability from the model's, over random images."""
    content: bytes
    """The file."""


def export(predictor: Predictor, task: str, path: str | Path, format: FormatName = "onnx",
           overwrite: bool = False, origin: str = "") -> Exported:
    """Writes a task's network to a file that runs without this package.

    Args:
        predictor: the model, on the CPU.
        task: a task's name or index, or `all` for all tasks in one file.
        path: the file to write; it appears only when it is complete.
        format: onnx, torch (a program of torch.export) or safetensors (tensors alone).
        overwrite: whether an existing file is replaced.
        origin: the registered version, for the record.

    Raises: InputError for an unknown task, an existing file, a missing package, or a network that
        the format cannot hold; IntegrityError where the file's answers are not the model's.
    """
    target = Path(path)
    check_output(target.name, format, target.exists() and not overwrite)
    FORMATS[format].require()
    exported = export_content(predictor, task, format, origin)
    write_whole(target, exported.content)
    return exported


def write_whole(target: Path, content: bytes) -> None:
    """Writes a file that appears only when it is complete, and its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        draft.write_bytes(content)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def check_output(name: str, format: FormatName, in_the_way: bool) -> None:
    """Raises InputError for a file name with another ending, or a file that is in the way."""
    ending = FORMATS[format].ending
    if not name.endswith(ending):
        raise InputError(f"output is {name!r}, but format is {format}; allowed: a name that ends "
                         f"in {ending}")
    if in_the_way:
        raise InputError(f"output {name!r} exists; allowed: another name, or --overwrite")


def export_content(predictor: Predictor, task: str, format: FormatName,
                   origin: str = "") -> Exported:
    """As `export`, without writing a file."""
    subject = _subject(predictor, task, format, origin)
    file = FORMATS[format]
    content = file.content(subject)
    difference = _difference(predictor, task, file, content, subject)
    if not difference <= TOLERANCE:  # false for NaN
        raise IntegrityError(f"the exported network's probabilities differ from the model's by "
                             f"{difference:.1g}; allowed: up to {TOLERANCE}; nothing was written")
    return Exported(subject.record, difference, content)


def _subject(predictor: Predictor, task: str, format: FormatName, origin: str) -> Subject:
    model, head = predictor.model, predictor.model.strategy.head
    if task == AUTO and AUTO not in predictor.tasks:
        raise InputError(f"task is {AUTO!r}, and a file holds no task inference; allowed: "
                         f"{', '.join(predictor.tasks)}, or {ALL}, where you give the task's index")
    if task == ALL and ALL not in predictor.tasks:
        slots = [predictor.task_index(name) for name in predictor.tasks]
        record = describe(model, [model.tasks[slot] for slot in slots], together=True,
                          normalises=True, origin=origin)
        weights = [predictor.head_weights(slot) for slot in slots]
        return Subject(TaskNetworks(model.trunk, head, weights), True, record)
    slot = predictor.task_index(task, (ALL,))
    own, facts, weights_of_task = None, dict[str, Any](), predictor.head_weights(slot)
    if format == "safetensors":
        reason = why_not(model, weights_of_task)
        try:
            own = None if reason else own_network(model, weights_of_task)
        except RuntimeError as error:  # of a network from another package
            reason = f"its tensors do not fit {model.trunk.name} of its library: {error}"
        call = own and own.backbone.call.format(classes=len(model.tasks[slot].classes),
                                                size=model.config.data.input_size)
        facts = {"loads_into": call, "why_not": reason}
    record = describe(model, [model.tasks[slot]], together=False, normalises=own is None,
                      origin=origin)
    return Subject(TaskNetwork(model.trunk, head, weights_of_task), False, record | facts,
                   own.body if own else None)


@torch.no_grad()
def _difference(predictor: Predictor, task: str, file: Format, content: bytes,
                subject: Subject) -> float:
    """Largest difference of a probability between the file and the model, on random images."""
    _, channels, height, width = subject.record["input"]["shape"]
    images_BCHW = torch.randint(0, 256, (3, channels, height, width), dtype=torch.uint8,
                                generator=torch.Generator().manual_seed(0))
    pixels_BCHW, worst = images_BCHW.float() / 255, 0.0
    run = file.opened(content, subject)
    z_BCHW = predictor.features(images_BCHW)
    for index, name in enumerate(predictor.tasks if subject.together else [task]):
        inputs = (pixels_BCHW, torch.tensor(index)) if subject.together else (pixels_BCHW,)
        slot = predictor.task_index(name)
        ours_BK = predictor.model.strategy.head(z_BCHW, predictor.head_weights(slot)).softmax(1)
        theirs_BL = run(*inputs).softmax(1)
        rest = theirs_BL[:, ours_BK.shape[1]:].sum()
        worst = max(worst, float((theirs_BL[:, :ours_BK.shape[1]] - ours_BK).abs().max() + rest))
    return worst
