"""The script with which MLflow serves a registered version: from images and tasks to labels.

MLflow copies this script into every version ("models from code") and runs it there, so it
imports nothing of `pipelines`. The checkpoint beside it is safetensors and JSON: nothing is
unpickled.

Input columns: `image` (bytes of an encoded image file; in JSON requests base64) and `task` (a
task's name, its index "0".."T-1", or "auto" to have it inferred). Rows of different tasks may be
mixed. Output columns, one row for each input row in the same order: `label` (name of the
likeliest class; null if the task was inferred and the image seems to belong to none), `probability`
(its probability), `classes` (all class names of the row's task) and `probabilities` (one for each
class, in the same order, summing to 1).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel

from partialhn.errors import InputError
from partialhn.predict import Answer, Predictor
from partialhn.task_inference import AUTO


class TaskClassifier(PythonModel):
    """Labels images with the classes of the task named in each row."""

    def load_context(self, context: Any) -> None:
        folder = Path(context.artifacts["checkpoint"])
        objects = (context.model_config or {}).get("objects")
        self.predictor = Predictor.load(folder, read=_reader(folder, objects) if objects else None)

    def predict(self, context: Any, model_input: pd.DataFrame,
                params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Labels the rows. Raises: MlflowException (a bad request when served) for wrong input."""
        del context, params
        try:
            answers = self._answers(list(model_input["image"]), list(model_input["task"]))
        except InputError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return pd.DataFrame({
            "label": [answer.label for answer in answers],
            "probability": [answer.probability for answer in answers],
            "classes": [list(answer.classes) for answer in answers],
            "probabilities": [list(answer.probabilities) for answer in answers],
        })

    def _answers(self, images: list[Any], tasks: list[Any]) -> list[Answer]:
        for number, (image, task) in enumerate(zip(images, tasks, strict=True)):
            if not isinstance(image, bytes | bytearray):
                raise InputError(f"image number {number} is of type {type(image).__name__}; "
                                 "allowed: bytes (the content of an image file), in JSON requests "
                                 "as base64")
            if not isinstance(task, str):
                raise InputError(f"the task of image number {number} is {task!r}; allowed: "
                                 f"{', '.join((*self.predictor.tasks, AUTO))}, as text")
            self.predictor.check_task(task)
        names = [f"number {number}" for number in range(len(images))]
        z_BCHW = self.predictor.features(self.predictor.decode_all(images, names))
        return self.predictor.answers(z_BCHW, tasks)


def _reader(folder: Path, objects: str) -> Callable[[str], bytes]:
    """Reads the tensors that versions share: beside this version where it was loaded from its
    place, and otherwise from where it was registered, as MLflow reaches it.
    """
    beside = folder.parents[4] / "objects" if len(folder.parents) > 4 else folder

    def read(sha256: str) -> bytes:
        name = f"{sha256}.safetensors"
        if (beside / name).is_file():
            return (beside / name).read_bytes()
        with tempfile.TemporaryDirectory() as scratch:
            return Path(mlflow.artifacts.download_artifacts(
                artifact_uri=f"{objects}/{name}", dst_path=scratch)).read_bytes()
    return read


mlflow.models.set_model(TaskClassifier())
