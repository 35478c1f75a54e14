"""The record in an exported file: inputs, outputs, preprocessing and origin."""

from collections.abc import Sequence
from typing import Any

from partialhn import __version__
from partialhn.checkpoints.model import Model, TaskInfo
from partialhn.data.experience import task_of

KEY = "partialhn"
"""Name of the record in a file's metadata; its value is JSON."""
INPUT, TASK, OUTPUT = "pixels", "task", "logits"
"""Names of the network's inputs and of its output."""


def describe(model: Model, tasks: Sequence[TaskInfo], *, together: bool, normalises: bool,
             origin: str) -> dict[str, Any]:
    """The record of the network of one task, or of all tasks `together`.

    normalises: whether the network subtracts the mean of pixels and divides by their spread.
    origin: the registered version, such as models:/my-stream/3.
    """
    size, pixels = model.config.data.input_size, model.trunk.pixels
    named = [{"name": task_of(task.name), "classes": list(task.classes)} for task in tasks]
    classes = max(len(task.classes) for task in tasks)
    return {
        "made_by": f"partialhn {__version__}", "model": origin,
        "weights_hash": model.weights_hash(), "backbone": model.trunk.name,
        "freeze_depth": model.trunk.freeze_depth, "strategy": model.config.train.strategy,
        **({"tasks": named} if together else {"task": named[0]["name"],
                                              "classes": named[0]["classes"]}),
        "preprocessing": {
            "size": size, "interpolation": pixels.interpolation,
            "antialias": pixels.interpolation != "nearest", "crop": pixels.crop,
            "squash": pixels.squash, "mean": model.trunk.mean_C.tolist(),
            "std": model.trunk.std_C.tolist(), "normalised_by_the_network": normalises,
            "steps": _steps(size, model, normalises)},
        "input": {"name": INPUT, "type": "float32", "shape": ["batch", 3, size, size],
                  "channels": ["red", "green", "blue"],
                  "range": [0, 1] if normalises else "normalised"},
        **({"task_input": {"name": TASK, "type": "int64", "shape": [],
                           "range": [0, len(tasks) - 1]}} if together else {}),
        "output": {"name": OUTPUT, "type": "float32", "shape": ["batch", classes],
                   "probabilities": "softmax over the classes"}}


def _steps(size: int, model: Model, normalises: bool) -> list[str]:
    """The steps that are done to an image before the network, in order."""
    pixels = model.trunk.pixels
    part = ("take the whole image" if pixels.squash else
            "take the central square" if pixels.crop == 1 else
            f"take the central square of {pixels.crop} times the shorter side")
    return ["divide values of 16 bits by 256",
            "convert to RGB: greyscale is repeated, transparency dropped, and an orientation tag "
            "ignored", part,
            f"resize to {size} x {size}, {pixels.interpolation}",
            "divide by 255",
            ("the network subtracts the mean and divides by the spread (std)" if normalises else
             "subtract the mean and divide by the spread (std)")]
