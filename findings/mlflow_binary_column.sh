#!/usr/bin/env bash
# Software: MLflow 3.17.2
# Expected: a signature with the column "image: binary (required)" refuses a text, a missing value
#   or an array, as "size: long" refuses a text and "score: double" even refuses whole numbers.
# Seen: text, None and arrays pass the check of a required binary column and arrive in predict as
#   they are. A number and an absent column are refused.
# Matters: image models are served with a binary column. A client that forgets the base64 step, or
#   sends no image, is not stopped by the signature, so the model has to check by itself.
# Another version: MLFLOW_VERSION=3.17.1 findings/mlflow_binary_column.sh
set -euo pipefail
packages=(
  "mlflow==${MLFLOW_VERSION:-3.17.2}"
)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if command -v uv > /dev/null; then
  uv venv --quiet "$folder/venv"
  uv pip install --quiet --python "$folder/venv/bin/python" "${packages[@]}"
else
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
fi
cd "$folder"
export MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1
printf 'with %s\n' "${packages[@]}"
venv/bin/python - << 'PYTHON'
import logging
import warnings

import mlflow

warnings.showwarning = lambda *arguments, **options: None

for name in ("mlflow", "alembic"):
    logging.getLogger(name).setLevel(logging.ERROR)
mlflow.set_tracking_uri("sqlite:///mlflow.db")

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

with open("model.py", "w") as file:
    file.write("""
import mlflow
class Shows(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return [type(value).__name__ for value in model_input.iloc[:, 0]]
mlflow.models.set_model(Shows())
""")


def model_with(kind):
    signature = ModelSignature(inputs=Schema([ColSpec(kind, "x", required=True)]))
    mlflow.pyfunc.save_model(kind, python_model="model.py", signature=signature,
                             pip_requirements=[])
    return mlflow.pyfunc.load_model(kind)


values = {"bytes": b"image", "text": "image", "None": None, "array": np.zeros(3, np.uint8),
          "whole number": 3}
seen = {}
for kind in ("binary", "long", "double"):
    model = model_with(kind)
    for name, value in values.items():
        try:
            seen[kind, name] = model.predict(pd.DataFrame({"x": [value]}))[0]
        except MlflowException:
            seen[kind, name] = "refused"
    print(f"{kind}:", ", ".join(f"{name} -> {seen[kind, name]}" for name in values))
try:
    mlflow.pyfunc.load_model("binary").predict(pd.DataFrame({"y": [b"image"]}))
    absent = "accepted"
except MlflowException:
    absent = "refused"
print("binary: an absent column ->", absent)
same = ([seen["binary", name] for name in values]
        == ["bytes", "str", "NoneType", "ndarray", "refused"] and seen["long", "text"] == "refused"
        and seen["double", "whole number"] == "refused" and absent == "refused")
raise SystemExit(None if same else "changed: the column is checked in another way")
PYTHON
