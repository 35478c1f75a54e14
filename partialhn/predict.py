"""Answers: encoded images and their tasks in, labels and probabilities out.

`Predictor.predict` answers for images of one task. `features` and `answers` are its two halves
for batches of mixed tasks: the trunk runs once over all of them, then each task's head over its
own. A task may be `auto`, to be inferred from the image.

Legend: B images, C channels, H W spatial, K classes of the task.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from partialhn.checkpoints.model import Model
from partialhn.data.decode import decode_images
from partialhn.data.experience import task_of
from partialhn.errors import InputError
from partialhn.networks.head import HeadWeights
from partialhn.networks.trunk import run_trunk
from partialhn.task_inference import AUTO, infer


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Answers for B images of one task."""

    labels: list[str]
    """The likeliest class of each image, by name."""
    probabilities_BK: npt.NDArray[np.float32]
    """Softmax over the task's classes; rows sum to 1."""
    classes: tuple[str, ...]
    """Names of the K columns."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer for one image of a batch of mixed tasks."""

    task: str
    """The task's name: given, or the likeliest."""
    label: str | None
    """The likeliest class; None where the image seems to be of no task that was learned."""
    probability: float
    """Of the likeliest class, among the classes of the task."""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Of all classes, in the same order."""


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
        auto = f", {AUTO}" if self.model.inference else ""
        raise InputError(f"task is {task!r}; allowed: {', '.join(self.tasks)}{auto} or an index "
                         f"from 0 to {len(self.tasks) - 1}")

    def check_task(self, task: str) -> None:
        """Raises InputError for a task that is neither known nor one that can be inferred."""
        if task != AUTO:
            self.task_index(task)
        elif self.model.inference is None:
            raise InputError(f"task is {AUTO!r}, but this model was made without what it takes to "
                             f"infer a task; allowed: {', '.join(self.tasks)}, or train it again")

    def head_weights(self, index: int) -> HeadWeights:
        """A slot's head weights, generated once."""
        if index not in self._weights:
            self._weights[index] = self.model.strategy.weights(index)
        return self._weights[index]

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
        classes = self.model.tasks[index].classes
        probabilities_BK = np.empty((len(images), len(classes)), np.float32)
        if len(images):
            z_BCHW = run_trunk(self.model.trunk, decoded.images_BCHW).to(self._device)
            logits_BK = self.model.strategy.head(z_BCHW, self.head_weights(index))
            probabilities_BK = logits_BK.softmax(1).cpu().numpy()
        labels = [classes[best] for best in probabilities_BK.argmax(1)] if len(images) else []
        return Prediction(labels, probabilities_BK, classes)

    def predict_auto(self, images: Sequence[bytes]) -> list[Answer]:
        """Labels encoded images whose tasks are not known.

        Raises: InputError for an image that cannot be decoded, or a model that infers no task.
        """
        self.check_task(AUTO)
        data = self.model.config.data
        decoded = decode_images(images, [f"number {i}" for i in range(len(images))],
                                data.input_size, max_pixels=data.max_image_pixels)
        return self.answers(self.features(decoded.images_BCHW), [AUTO] * len(images))

    @torch.no_grad()
    def features(self, images_BCHW: Tensor, exact: bool = True) -> Tensor:
        """Trunk features z_BCHW of uint8 images, on the model's device.

        exact: an image's features are the same bits in any company, for which small batches are
        filled up; without, they are equal but for rounding and a few images take less time.
        """
        if exact or not len(images_BCHW):
            return run_trunk(self.model.trunk, images_BCHW).to(self._device)
        features_BCHW: Tensor = self.model.trunk(images_BCHW.to(self._device))
        return features_BCHW

    @torch.no_grad()
    def answers(self, z_BCHW: Tensor, tasks: Sequence[str]) -> list[Answer]:
        """Answers from trunk features, each image with the task given for it, or with `auto`.

        Raises: InputError for an unknown task.
        """
        for task in set(tasks):
            self.check_task(task)
        index_B = torch.tensor([-1 if task == AUTO else self.task_index(task) for task in tasks],
                               dtype=torch.int64)
        known_B = torch.ones(len(tasks), dtype=torch.bool)
        unsaid_U = torch.nonzero(index_B < 0)[:, 0]
        head, inference = self.model.strategy.head, self.model.inference
        if len(unsaid_U) and inference is not None:
            slots = [self.task_index(task) for task in self.tasks]
            weights = [self.head_weights(slot) for slot in slots]
            found = infer(inference, head, slots, weights, z_BCHW[unsaid_U])
            index_B[unsaid_U], known_B[unsaid_U] = found.slot_B, found.known_B
        made: list[Answer | None] = [None] * len(tasks)
        for index in sorted(set(index_B.tolist())):
            info, rows_R = self.model.tasks[index], torch.nonzero(index_B == index)[:, 0]
            p_RK = head(z_BCHW[rows_R], self.head_weights(index)).softmax(1).cpu().double()
            for row, p_K in zip(rows_R.tolist(), p_RK, strict=True):
                best = int(p_K.argmax())
                made[row] = Answer(task_of(info.name), info.classes[best] if known_B[row] else None,
                                   float(p_K[best]), info.classes, tuple(p_K.tolist()))
        return [answer for answer in made if answer is not None]
