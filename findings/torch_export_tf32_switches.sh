#!/usr/bin/env bash
# Software: torch 2.15.0
# Expected: TF32 exists on NVIDIA GPUs alone. Whoever switches it off with the newer of PyTorch's two
#   interfaces, torch.backends.cudnn.fp32_precision = "ieee", as its own warnings advise, changes
#   nothing on a CPU; torch.export of a convolution there gives the same program.
# Seen: torch.export raises RuntimeError on the CPU. It reads the older switch,
#   torch.backends.cudnn.allow_tf32, which stays True and refuses to be read beside the newer one.
#   torch.compile of the same module works. With the older switch set to False first, both work.
# Matters: a training process that asks for exact float32 can learn and cannot export its model; the
#   same export in a fresh process works, so the fault looks like one of the model.
# Another version: TORCH_VERSION=2.14.0 findings/torch_export_tf32_switches.sh
set -euo pipefail
packages=(
  "torch==${TORCH_VERSION:-2.15.0}"
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
import subprocess
import sys

CASE = """
import sys
import torch
older, newer = sys.argv[1:]
if older == "off":
    torch.backends.cudnn.allow_tf32 = False
if newer == "off":
    torch.backends.cudnn.fp32_precision = "ieee"
layer, images = torch.nn.Conv2d(3, 4, 3).eval(), (torch.zeros(2, 3, 8, 8),)
try:
    torch.export.export(layer, images)
    print("exported")
except RuntimeError as error:
    assert "TF32" in str(error), error
    print("refused")
"""
seen = []
for older in ("default", "off"):
    for newer in ("default", "off"):
        done = subprocess.run([sys.executable, "-c", CASE, older, newer], check=True, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        seen.append(done.stdout.strip())
        print(f"older switch {older}, newer {newer}: {seen[-1]}")
same = seen == ["exported", "refused", "exported", "exported"]
raise SystemExit(None if same else "changed: the export is refused in other cases, or in none")
PYTHON
