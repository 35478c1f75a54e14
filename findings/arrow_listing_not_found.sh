#!/usr/bin/env bash
# Software: pyarrow 25.0.1 (and 26.0.1)
# Expected: FileSelector(folder, allow_not_found=True) never raises for a folder that is missing: its
#   listing is empty, or has what is in the folder.
# Seen: where another process creates the folder at that moment, the listing raises
#   FileNotFoundError, for a folder that is there by then. Arrow asks whether the folder is missing
#   only after the listing has failed.
# Matters: several processes that start on an empty place (workers that share a log, a scheduler and
#   its jobs) list a folder that one of them is creating. One of them dies, rarely, with a message
#   that names an existing folder. The flag that is meant for this case hides it in tests.
# Another version: PYARROW_VERSION=26.0.1 findings/arrow_listing_not_found.sh
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
import collections
import subprocess
import sys

from pyarrow import fs

ROUNDS = 5000
CREATE = """
import sys
from pathlib import Path

for number, _ in enumerate(sys.stdin.buffer):
    Path("listed", str(number), "inside").mkdir(parents=True)
"""
local = fs.LocalFileSystem()
creator = subprocess.Popen([sys.executable, "-c", CREATE], stdin=subprocess.PIPE)
seen = collections.Counter()
example = None
for number in range(ROUNDS):
    creator.stdin.write(b"\n")
    creator.stdin.flush()
    entries = 0
    while entries == 0:
        try:
            found = local.get_file_info(fs.FileSelector(f"listed/{number}", allow_not_found=True))
            entries = len(found)
            seen[f"{entries} entries"] += 1
        except FileNotFoundError as error:
            seen["FileNotFoundError"] += 1
            example = error
creator.stdin.close()
creator.wait(60)
print(f"{ROUNDS} folders, each listed until it was there: {dict(seen)}")
print(f"for instance: {example}")
same = example is not None
raise SystemExit(None if same else "changed: no listing failed (the processes need a core each)")
PYTHON
