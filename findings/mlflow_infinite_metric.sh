#!/usr/bin/env bash
# Software: MLflow 3.17.2 (SQLite)
# Expected: a metric of infinity is stored as infinity or refused, as NaN is stored as NaN.
# Seen: infinity comes back as the greatest finite number, about 1.797e308, without an error or a
#   warning, while NaN in the same run comes back as NaN.
# Matters: "is this run's loss finite" is the usual test for divergence. Asked of what MLflow gives
#   back it says yes for a loss that overflowed, and a mean over two such runs is infinite again.
# Another version: MLFLOW_VERSION=3.17.1 findings/mlflow_infinite_metric.sh
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

import math
import sys

client = mlflow.MlflowClient()
run = client.create_run(client.create_experiment("losses")).info.run_id
given = {"overflowed": math.inf, "underflowed": -math.inf, "undefined": math.nan, "usual": 0.5}
for name, value in given.items():
    client.log_metric(run, name, value)
stored = client.get_run(run).data.metrics
for name, value in given.items():
    print(f"{name}: logged {value}, comes back as {stored[name]}, "
          f"finite: {math.isfinite(stored[name])}")
same = (stored["overflowed"] == sys.float_info.max and stored["underflowed"] == -sys.float_info.max
        and math.isnan(stored["undefined"]) and stored["usual"] == 0.5)
raise SystemExit(None if same else "changed: infinity comes back in another way")
PYTHON
