#!/usr/bin/env bash
# Software: DuckDB 2.0.1, pyarrow 25.0.1 (and 26.0.1)
# Expected: a filter gives the same rows with and without column statistics, which only make it
#   quicker. Engines may differ on whether NaN is greater than 0.6, but no engine gives NaN for
#   "loss = 0.1".
# Seen: the minimum and maximum that pyarrow writes leave NaN out, and both readers decide from them
#   about whole row groups. DuckDB, for which NaN is the greatest number, finds the diverged run with
#   "loss > 0.6" only in the file without statistics, and gives the NaN row for "loss = 0.1" where
#   all other rows are 0.1. pyarrow's own "not loss <= 0.6" loses the NaN row too.
# Matters: a run that diverged has a loss of NaN. Whether a query over a table of runs finds it, or
#   takes it for a good one, depends on how the file was written.
# Another version: DUCKDB_VERSION=1.5.6 PYARROW_VERSION=26.0.1 findings/parquet_nan_statistics.sh
set -euo pipefail
packages=(
  "duckdb==${DUCKDB_VERSION:-2.0.1}"
  "pyarrow==${PYARROW_VERSION:-25.0.1}"
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
printf 'with %s\n' "${packages[@]}"
venv/bin/python - << 'PYTHON'
import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

runs = pa.table({"run": ["a", "diverged", "c"], "loss": [0.1, float("nan"), 0.1]})


def by_duckdb(path, where):
    rows = duckdb.sql(f"select run from '{path}' where {where} order by run").fetchall()
    return [run for run, in rows]


def by_pyarrow(path, where):
    return sorted(ds.dataset(path).to_table(filter=where)["run"].to_pylist())


answers = {}
for path, statistics in (("with.parquet", True), ("without.parquet", False)):
    pq.write_table(runs, path, write_statistics=statistics)
    answers[statistics] = {
        "DuckDB, loss > 0.6": by_duckdb(path, "loss > 0.6"),
        "DuckDB, loss = 0.1": by_duckdb(path, "loss = 0.1"),
        "pyarrow, not loss <= 0.6": by_pyarrow(path, ~(ds.field("loss") <= 0.6)),
    }
for question, answer in answers[True].items():
    print(f"{question}: with statistics {answer}, without {answers[False][question]}")
same = (list(answers[True].values()) == [[], ["a", "c", "diverged"], []]
        and list(answers[False].values()) == [["diverged"], ["a", "c"], ["diverged"]])
raise SystemExit(None if same else "changed: other rows are found")
PYTHON
