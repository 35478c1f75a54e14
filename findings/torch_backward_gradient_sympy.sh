#!/usr/bin/env bash
# Software: torch 2.15.0
# Expected: loss.backward(gradient) with the gradient in hand, so that PyTorch need not create a one
#   for every step, does no more than loss.backward(); a process that never compiles or exports
#   anything does not load a library for symbolic mathematics.
# Seen: the first backward pass with an explicit gradient, for a loss and for torch.autograd.grad
#   alike, imports SymPy and its hundreds of modules in the middle of the first step: the check of
#   shapes asks whether a size is symbolic. Without a gradient nothing is imported.
# Matters: short jobs pay for it each time (0.2 s of the processor here, bytecode kept), and the first
#   step of a process looks slow for a reason that no profile of operations shows.
# Another version: TORCH_VERSION=2.14.0 findings/torch_backward_gradient_sympy.sh
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
import time
import torch
weight = torch.ones(3, requires_grad=True)
loss, one, start = (2 * weight).sum(), torch.ones(()), time.process_time()
assert "sympy" not in sys.modules
WAY
print(sum(name.split(".")[0] == "sympy" for name in sys.modules),
      round(time.process_time() - start, 1))
"""
WAYS = ("loss.backward()", "loss.backward(one)", "torch.autograd.grad(loss, weight)",
        "torch.autograd.grad(loss, weight, one)")
loaded = []
for way in WAYS:
    done = subprocess.run([sys.executable, "-c", CASE.replace("WAY", way)], check=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    modules, seconds = done.stdout.split()
    loaded.append(int(modules) > 100)
    print(f"{way}: {modules} modules of SymPy, {seconds} s of the processor")
same = loaded == [False, True, False, True]
raise SystemExit(None if same else "changed: SymPy is imported in other cases, or in none")
PYTHON
