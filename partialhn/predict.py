"""Prediction: from encoded images and their tasks to labels and probabilities.

`Predictor.predict` labels images of one task. For batches of mixed tasks it is split in two:
`features` runs the trunk once over all images, then `answers` runs each task's head over its own
images. A task may be given as `auto`; it is then inferred from the image.

Legend: B images, U images with task `auto`, R images of one task, C channels, H W spatial,
K classes of the task, L most classes of a task.
"""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from partialhn.checkpoints import FIELDS, TENSORS, shared
from partialhn.checkpoints.model import Model
from partialhn.data.decode import Decoded, decode_images
from partialhn.data.experience import newest_slots, task_of
from partialhn.errors import InputError
from partialhn.networks.device_memory import explained
from partialhn.networks.head import HeadWeights
from partialhn.networks.trunk import run_trunk
from partialhn.numbers import counted
from partialhn.strategies.heads import Heads
from partialhn.task_inference import AUTO, Inferred, infer

WAY_OUT = "device cpu, or a device with more memory"
"""What a user can do where a model needs more memory than its device has."""

STREAM = "stream.json"
"""The file that a stream of `partialhn.notebook` has in its folder."""
LONGEST_SHOWN = 100
"""Characters of an unknown task's name that a message repeats."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """Predictions for B images of one task."""

    labels: list[str]
    """The likeliest class of each image, by name."""
    probabilities_BK: npt.NDArray[np.float32]
    """Softmax over the task's classes; each row sums to 1."""
    classes: tuple[str, ...]
    """Class names of the K columns."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The prediction for one image of a batch of mixed tasks."""

    task: str
    """Name of the task: the given one, or the likeliest."""
    label: str | None
    """The likeliest class; None if the image seems to belong to no learned task."""
    probability: float
    """Probability of the likeliest class, among the classes of the task."""
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    """Probability of each class, in the order of `classes`."""
    task_probability: float | None = None
    """Probability of the task among all tasks, where it was inferred; None where it was given."""


class AutoAccuracy(NamedTuple):
    """Shares of a stream's test images, mean over its tasks, where nobody says the task.

    The first three count every image, before any is taken for one of no known task.
    """

    task: float
    """Share whose task is inferred correctly."""
    right: float
    """Share that get the right class."""
    given: float
    """The same share where the task is given."""
    rejected: float | None = None
    """Share taken for images of no known task, which get no label; None in old records."""

    @staticmethod
    def from_fields(fields: object) -> "AutoAccuracy | None":
        """From the metrics of `partialhn.evaluation.task_inference_metrics.without_task_id`; None
        where they are missing.
        """
        keys = ("task_accuracy", "acc", "acc_given")
        if not isinstance(fields, Mapping) or not all(
                isinstance(fields.get(key), float | int) for key in keys):
            return None
        rejected = fields.get("known_rejected")
        task, right, given = (float(fields[key]) for key in keys)
        return AutoAccuracy(task, right, given,
                            float(rejected) if isinstance(rejected, float | int) else None)


class Predictor:
    """A loaded model for predictions; it keeps the head weights of the tasks last asked for."""

    def __init__(self, model: Model, device: torch.device | str = "cpu") -> None:
        self.model = model
        self._device = torch.device(device)
        with explained(f"the model on device {self._device}", WAY_OUT):
            model.trunk.to(self._device)
            model.strategy.to(self._device)
        newest = newest_slots([task.name for task in model.tasks])
        self.tasks: list[str] = list(newest)
        """Names of the tasks, oldest first; a refreshed task is listed once."""
        self._slots = {slot.name: index for index, slot in enumerate(model.tasks)} | newest
        """The slot of each name; of a task's name, the newest."""
        self._newest = Heads(model.strategy, list(newest.values()))

    @staticmethod
    def load(folder: str | Path, device: torch.device | str = "cpu",
             read: shared.Read | None = None) -> "Predictor":
        """Reads a checkpoint folder, which stays as it is.

        read: gives the tensors that the model shares with others, where the folder lacks them.
        Raises: IntegrityError if something is missing or damaged; InputError for the folder of a
        stream, which holds more than one model.
        """
        if (Path(folder) / STREAM).exists() and not (Path(folder) / FIELDS).exists():
            raise InputError(f"folder {str(folder)!r} is that of a stream; allowed: the folder of "
                             "one model, such as Stream.save(FOLDER) writes, or "
                             "Stream(folder=...).predict(...)")
        if read is None or (Path(folder) / TENSORS).exists():
            return Predictor(Model.load(Path(folder)), device)
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy(Path(folder) / FIELDS, scratch)
            shared.complete(Path(scratch), read)
            return Predictor(Model.load(Path(scratch)), device)

    def task_index(self, task: str, also: Sequence[str] = ()) -> int:
        """Index of the slot that is used for a task, given by name or by its index in `tasks`.

        For a refreshed task it is the newest slot. also: other words that the caller allows, for
        the message. Raises: InputError listing the tasks.
        """
        if task in self._slots:
            return self._slots[task]
        if task.isdecimal() and int(task) < len(self.tasks):
            return self._slots[self.tasks[int(task)]]
        for forgotten in self.model.facts.get("forgotten", ()):
            if task == forgotten["task"]:
                why = f" ({forgotten['why']})" if forgotten["why"] else ""
                raise InputError(f"task is {task!r}, which this model has forgotten on "
                                 f"{forgotten['time'][:10]}{why}; allowed: "
                                 f"{', '.join(self.tasks)}")
        shown = task if len(task) <= LONGEST_SHOWN else f"{task[:LONGEST_SHOWN]}..."
        raise InputError(f"task is {shown!r}; allowed: {', '.join((*self.tasks, *also))} or an "
                         f"index from 0 to {len(self.tasks) - 1}")

    def check_task(self, task: str) -> None:
        """Raises InputError for an unknown task, or for `auto` if this model cannot infer tasks."""
        if task != AUTO:
            self.task_index(task, (AUTO,) if self.model.inference else ())
        elif self.model.inference is None:
            raise InputError(f"task is {AUTO!r}, but this model was trained without task "
                             f"inference; allowed: {', '.join(self.tasks)}, or train it again")

    @property
    def auto_accuracy(self) -> AutoAccuracy | None:
        """Accuracy of `auto` on the stream's test images; None where it was not measured."""
        chain = self.model.facts.get("chain")
        record = chain.get("record") if isinstance(chain, Mapping) else None
        found = record.get("without_id") if isinstance(record, Mapping) else None
        return AutoAccuracy.from_fields(found) if self.model.inference else None

    def head_weights(self, index: int) -> HeadWeights:
        """The head weights of a slot."""
        return self._newest.of_task(index)

    def decode(self, images: Sequence[bytes], ids: Sequence[str],
               on_bad: Literal["error", "skip"] = "error",
               max_pixels: int | None = None) -> Decoded:
        """Encoded images as the model's trunk takes them; `ids` name them in messages.

        max_pixels: a stricter limit than the model's own. Raises: InputError for an image that
        cannot be decoded, unless on_bad is skip.
        """
        data = self.model.config.data
        limit = min(data.max_image_pixels, max_pixels or data.max_image_pixels)
        return decode_images(images, ids, data.input_size, on_bad=on_bad, max_pixels=limit,
                             pixels=self.model.trunk.pixels)

    def decode_all(self, images: Sequence[bytes], ids: Sequence[str]) -> Tensor:
        """As `decode`, for images that all have to be readable; uint8 (B, 3, size, size).

        Raises: InputError for anything but encoded images, or naming one that cannot be decoded.
        """
        given: object = images  # a string is a sequence too, and of bytes where it is bytes
        odd = [given] if isinstance(given, str | bytes | bytearray) else [
            image for image in images if not isinstance(image, bytes | bytearray)]
        if odd:
            raise InputError(f"images is, or holds, a {type(odd[0]).__name__}; allowed: a list of "
                             "encoded images, such as [Path('a.png').read_bytes()]")
        decoded = self.decode(images, ids, "skip")
        for bad in decoded.bad:
            raise InputError(f"image {bad.id} {bad.reason}; mend it or leave it out")
        return decoded.images_BCHW

    @torch.no_grad()
    def predict(self, images: Sequence[bytes], task: str | int) -> Prediction:
        """Labels encoded images with the classes of one task.

        An image's prediction does not depend on the other images. Raises: InputError for an
        unknown task, for anything but a list of encoded images, or naming the position of an image
        that cannot be decoded.
        """
        if task == AUTO and self.model.inference:
            raise InputError(f"task is {AUTO!r}; allowed: {', '.join(self.tasks)}, or "
                             "predict_auto(images), which infers it")
        index = self.task_index(str(task))
        images_BCHW = self.decode_all(images, _numbers(images))
        classes = self.model.tasks[index].classes
        probabilities_BK = np.empty((len(images), len(classes)), np.float32)
        if len(images):
            z_BCHW = self.features(images_BCHW)
            with self._memory_for("answering", len(images)):
                logits_BK = self.model.strategy.head(z_BCHW, self.head_weights(index))
                probabilities_BK = logits_BK.softmax(1).cpu().numpy()
        labels = [classes[best] for best in probabilities_BK.argmax(1)] if len(images) else []
        return Prediction(labels, probabilities_BK, classes)

    def predict_auto(self, images: Sequence[bytes]) -> list[Answer]:
        """Labels encoded images whose tasks are not known.

        Raises: InputError for anything but a list of encoded images, for an image that cannot be
        decoded, or if this model cannot infer tasks.
        """
        self.check_task(AUTO)
        images_BCHW = self.decode_all(images, _numbers(images))
        return self.answers(self.features(images_BCHW), [AUTO] * len(images))

    @torch.no_grad()
    def features(self, images_BCHW: Tensor, exact: bool = True) -> Tensor:
        """Trunk features z_BCHW of uint8 images, on the model's device.

        exact: an image's features are the same bits whatever the other images are; small batches
        are filled up for that. Otherwise they may differ by rounding, and a few images take less
        time.

        Raises: DeviceMemoryError if the device's memory does not suffice.
        """
        with self._memory_for("features of", len(images_BCHW)):
            if exact or not len(images_BCHW):
                return run_trunk(self.model.trunk, images_BCHW, self._device)
            features_BCHW: Tensor = self.model.trunk(images_BCHW.to(self._device))
            return features_BCHW

    @torch.no_grad()
    def answers(self, z_BCHW: Tensor, tasks: Sequence[str]) -> list[Answer]:
        """Predictions from trunk features z_BCHW, with a task or `auto` given for each image.

        Raises: InputError for an unknown task, and DeviceMemoryError if the device's memory does
        not suffice.
        """
        for task in set(tasks):
            self.check_task(task)
        with self._memory_for("answering", len(z_BCHW)):
            return self._answers(z_BCHW, tasks)

    def _answers(self, z_BCHW: Tensor, tasks: Sequence[str]) -> list[Answer]:
        index_B = torch.tensor([-1 if task == AUTO else self.task_index(task) for task in tasks],
                               dtype=torch.int64)
        known_B = torch.ones(len(tasks), dtype=torch.bool)
        auto_U = torch.nonzero(index_B < 0)[:, 0]
        p_by_row: dict[int, Tensor] = {}
        task_p_by_row: dict[int, float] = {}
        if len(auto_U):
            inferred = self._infer(z_BCHW[auto_U])
            index_B[auto_U], known_B[auto_U] = inferred.slot_B, inferred.known_B
            task_p_by_row = dict(zip(auto_U.tolist(), inferred.task_p_B.tolist(), strict=True))
            if inferred.p_BL is not None:
                p_by_row = dict(zip(auto_U.tolist(), inferred.p_BL.double(), strict=True))
        slot_of_row = dict(enumerate(index_B.tolist()))
        for slot in sorted({slot_of_row[row] for row in slot_of_row.keys() - p_by_row.keys()}):
            rows = [row for row in slot_of_row if slot_of_row[row] == slot and row not in p_by_row]
            z_RCHW = z_BCHW[torch.tensor(rows, device=z_BCHW.device)]
            logits_RK = self.model.strategy.head(z_RCHW, self.head_weights(slot))
            p_by_row |= zip(rows, logits_RK.softmax(1).cpu().double(), strict=True)
        return [self._answer(slot, bool(known_B[row]), p_by_row[row], task_p_by_row.get(row))
                for row, slot in slot_of_row.items()]

    def _memory_for(self, work: str, count: int) -> contextlib.AbstractContextManager[None]:
        """A context in which running out of memory is an error that names the work."""
        size = self.model.config.data.input_size
        return explained(f"{work} {counted(count, 'image')} of {size} x {size} pixels at once on "
                         f"device {self._device}", f"fewer images at once, {WAY_OUT}")

    def _infer(self, z_BCHW: Tensor) -> Inferred:
        assert self.model.inference is not None, "check_task has refused auto"
        slots = [self._slots[task] for task in self.tasks]
        return infer(self.model.inference, self.model.strategy.head, slots, self._newest, z_BCHW)

    def _answer(self, slot: int, known: bool, p_L: Tensor, task_p: float | None) -> Answer:
        """The answer of a slot with probabilities p_L, of which those after its classes are 0."""
        info = self.model.tasks[slot]
        p_K = p_L[:len(info.classes)]
        best = int(p_K.argmax())
        return Answer(task_of(info.name), info.classes[best] if known else None, float(p_K[best]),
                      info.classes, tuple(p_K.tolist()), task_p)


def _numbers(images: Sequence[bytes]) -> list[str]:
    """Names for images that have none."""
    return [f"number {number}" for number in range(len(images))]
