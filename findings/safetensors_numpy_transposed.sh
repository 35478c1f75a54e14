#!/usr/bin/env bash
# Software: safetensors 0.8.0, numpy 2.4.6
# Expected: safetensors.numpy saves a transposed array by value (as numpy.save does), or refuses an
#   array that is not contiguous.
# Seen: it writes the bytes as they lie in memory under the shape of the view. The file loads without
#   an error, names, shapes and dtypes are right, and the values are in another order. Version 0.7.0
#   saved the values as given.
# Matters: kernels converted from frameworks with channels last are transposed on the way. The
#   converted trunk passes every check of names and shapes, and its features are meaningless.
# Another version: SAFETENSORS_VERSION=0.7.0 findings/safetensors_numpy_transposed.sh
set -euo pipefail
packages=(
  "safetensors==${SAFETENSORS_VERSION:-0.8.0}"
  "numpy==${NUMPY_VERSION:-2.4.6}"
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
import numpy as np
from safetensors.numpy import load, load_file, save, save_file

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
tensors = {"transposed": weight.T, "copied": np.ascontiguousarray(weight.T)}
save_file(tensors, "trunk.safetensors")
np.save("transposed.npy", weight.T)
stored = load_file("trunk.safetensors")
from_bytes = load(save(tensors))
print("given:", weight.T.tolist())
print("numpy.save gives back:", np.load("transposed.npy").tolist())
print("safetensors gives back:", stored["transposed"].tolist(), stored["transposed"].shape)
print("safetensors, from a contiguous copy:", stored["copied"].tolist())
same = (stored["transposed"].shape == weight.T.shape
        and stored["transposed"].tolist() == [[0, 1], [2, 3], [4, 5]]
        and from_bytes["transposed"].tolist() == [[0, 1], [2, 3], [4, 5]]
        and np.array_equal(stored["copied"], weight.T)
        and np.array_equal(np.load("transposed.npy"), weight.T))
raise SystemExit(None if same else "changed: a transposed array is saved in another way")
PYTHON
