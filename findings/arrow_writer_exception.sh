#!/usr/bin/env bash
# Software: pyarrow 25.0.1 (and 26.0.1)
# Expected: a file whose writer was left by an exception has no footer, and every reader refuses it.
# Seen: the writers close themselves when the block ends for any reason, and closing writes the
#   footer. What is left is a valid, shorter Parquet or Arrow file; nothing in it says that rows are
#   missing.
# Matters: "it opens, so it is whole" does not hold. A job that dies in its third batch leaves a data
#   set or a table of predictions of two batches that looks finished.
# Another version: PYARROW_VERSION=26.0.1 findings/arrow_writer_exception.sh
set -euo pipefail
packages=(
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
import pyarrow as pa
import pyarrow.parquet as pq

batch = pa.table({"label": list(range(100))})
writers = {"table.parquet": lambda path: pq.ParquetWriter(path, batch.schema),
           "table.arrow": lambda path: pa.ipc.new_file(path, batch.schema)}
readers = {"table.parquet": pq.read_table,
           "table.arrow": lambda path: pa.ipc.open_file(path).read_all()}
rows = {}
for path, open_writer in writers.items():
    try:
        with open_writer(path) as writer:
            for number in range(10):
                if number == 2:
                    raise ValueError("the third batch cannot be made")
                writer.write_table(batch)
    except ValueError as error:
        try:
            rows[path] = readers[path](path).num_rows
            print(f"{path}: writing ended with {error!r}; reads as {rows[path]} rows of 1000")
        except pa.ArrowInvalid as refused:
            rows[path] = None
            print(f"{path}: writing ended with {error!r}; is refused: {refused}")
same = rows == {"table.parquet": 200, "table.arrow": 200}
raise SystemExit(None if same else "changed: an unfinished file reads in another way")
PYTHON
