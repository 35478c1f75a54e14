#!/usr/bin/env bash
# Software: MLflow 3.17.2 (SQLite)
# Expected: search_model_versions gives the same ModelVersion as get_model_version, its aliases
#   included, with the newest version first or last.
# Seen: every version that a search gives has an empty list of aliases; the aliases are there when
#   the version is fetched alone. A search without an order starts with the version that was changed
#   last, and setting a tag or an alias is no change while editing a description is one.
# Matters: "which of these is the champion" answered from a search is "none": code that then deletes
#   versions without an alias deletes the one in use. "versions[0] is the newest" holds in every test
#   and ends with the first description that somebody edits.
# Another version: MLFLOW_VERSION=3.17.1 findings/mlflow_search_without_aliases.sh
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

client = mlflow.MlflowClient()
client.create_registered_model("stream")
for number in range(3):
    client.create_model_version("stream", source="file:///nowhere/model")
client.set_registered_model_alias("stream", "champion", "2")


def search():
    return client.search_model_versions("name = 'stream'")


order = [[int(version.version) for version in search()]]
client.set_model_version_tag("stream", "1", "task", "digits")
order.append([int(version.version) for version in search()])
client.update_model_version("stream", "1", description="a better text")
order.append([int(version.version) for version in search()])
searched = {int(version.version): list(version.aliases) for version in search()}
fetched = {number: list(client.get_model_version("stream", str(number)).aliases)
           for number in (1, 2, 3)}
print("aliases by search:", searched)
print("aliases by get_model_version:", fetched)
print("order at first, after a tag on 1, after a description of 1:", *order)
same = (searched == {1: [], 2: [], 3: []} and fetched == {1: [], 2: ["champion"], 3: []}
        and order == [[3, 2, 1], [3, 2, 1], [1, 3, 2]])
raise SystemExit(None if same else "changed: a search gives something else")
PYTHON
