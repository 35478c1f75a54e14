"""What MLflow runs to serve a registered version: images and task names in, labels out.

MLflow copies this script into every version ("models from code") and runs it there, so it
imports nothing of `pipelines`. The checkpoint beside it is safetensors and JSON: nothing is
unpickled.

Input columns: `image` (bytes of an encoded image file; in JSON requests base64) and `task` (a
task's name, or its index "0".."T-1"). Rows of different tasks may be mixed.
Output columns, one row for each input row in the same order: `label` (name of the likeliest
class), `probability` (its probability), `classes` (all class names of the row's task) and
`probabilities` (theirs, in the same order, summing to 1).
"""

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel


class TaskClassifier(PythonModel):
    """Labels images with the classes of the task named in each row."""

    def load_context(self, context):
        from partialhn.predict import Predictor

        self.predictor = Predictor.load(context.artifacts["checkpoint"])

    def predict(self, context, model_input: pd.DataFrame, params=None):  # noqa: ARG002
        parts = []
        for task, rows in model_input.reset_index(drop=True).groupby("task", sort=False):
            found = self.predictor.predict([bytes(image) for image in rows["image"]], str(task))
            parts.append(pd.DataFrame({
                "label": found.labels,
                "probability": found.probabilities_BK.max(axis=1).astype(float),
                "classes": [list(found.classes)] * len(rows),
                "probabilities": found.probabilities_BK.astype(float).tolist(),
            }, index=rows.index))
        columns = ["label", "probability", "classes", "probabilities"]
        return pd.concat(parts).sort_index() if parts else pd.DataFrame(columns=columns)


mlflow.models.set_model(TaskClassifier())
