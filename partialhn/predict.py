"""Answers: encoded images and a task in, labels and probabilities out.

Legend: B images, K classes of the task.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from partialhn.checkpoint import Model
from partialhn.datasets import decode_images
from partialhn.errors import InputError
from partialhn.featurise import run_trunk
from partialhn.model import HeadWeights
from partialhn.stream import task_of


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Answers for B images of one task."""

    labels: list[str]
    """The likeliest class of each image, by name."""
    probabilities_BK: npt.NDArray[np.float32]
    """Softmax over the task's classes; rows sum to 1."""
    classes: tuple[str, ...]
    """Names of the K columns."""


class Predictor:
    """A loaded model that keeps each task's head weights once they were generated."""

    def __init__(self, model: Model, device: torch.device | str = "cpu") -> None:
        self.model = model
        self._device = torch.device(device)
        model.trunk.to(self._device)
        model.strategy.to(self._device)
        self._weights: dict[int, HeadWeights] = {}

    @staticmethod
    def load(folder: str | Path, device: torch.device | str = "cpu") -> "Predictor":
        """Reads a checkpoint folder. Raises: IntegrityError for a damaged one."""
        return Predictor(Model.load(Path(folder)), device)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, oldest first; each once, however often it was refreshed."""
        return list(dict.fromkeys(task_of(task.name) for task in self.model.tasks))

    def task_index(self, task: str) -> int:
        """The slot that answers for a task given by name, or by its place in `tasks`.

        The newest slot of a refreshed task answers. Raises: InputError listing the tasks.
        """
        if task not in self.tasks and task.isdecimal() and int(task) < len(self.tasks):
            task = self.tasks[int(task)]
        for index, slot in reversed(list(enumerate(self.model.tasks))):
            if task in (task_of(slot.name), slot.name):
                return index
        raise InputError(f"task is {task!r}; allowed: {', '.join(self.tasks)} or an index from 0 "
                         f"to {len(self.tasks) - 1}")

    @torch.no_grad()
    def predict(self, images: Sequence[bytes], task: str) -> Prediction:
        """Labels encoded images with the classes of one task.

        An image's answer is the same in any company. Raises: InputError for an unknown task or an
        image that cannot be decoded, by its position.
        """
        index = self.task_index(task)
        data = self.model.config.data
        decoded = decode_images(images, [f"number {i}" for i in range(len(images))],
                                data.input_size, max_pixels=data.max_image_pixels)
        if index not in self._weights:
            self._weights[index] = self.model.strategy.weights(index)
        classes = self.model.tasks[index].classes
        probabilities_BK = np.empty((len(images), len(classes)), np.float32)
        if len(images):
            z_BCHW = run_trunk(self.model.trunk, decoded.images_BCHW).to(self._device)
            logits_BK = self.model.strategy.head(z_BCHW, self._weights[index])
            probabilities_BK = logits_BK.softmax(1).cpu().numpy()
        labels = [classes[best] for best in probabilities_BK.argmax(1)] if len(images) else []
        return Prediction(labels, probabilities_BK, classes)
