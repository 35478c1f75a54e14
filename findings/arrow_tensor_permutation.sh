#!/usr/bin/env bash
# Software: pyarrow 25.0.1 (and 26.0.1), numpy 2.4.6
# Expected: FixedShapeTensorArray.from_numpy_ndarray and to_numpy_ndarray are inverses. A view whose
#   axes are permuted is stored as it lies in memory with a permutation, and comes back equal.
# Seen: a view that swaps two axes comes back equal. A view that rotates three axes (images stored
#   height, width, channels and seen as channels, height, width) is stored without an error and does
#   not come back: 3 x 3 x 3 patches have the right shape and rotated values, images of 32 x 32 x 3
#   raise an error about strides when they are read, from a file too.
# Matters: channels-last images viewed as channels-first are the normal input of torch. A test with
#   one swapped pair of axes notices nothing, and the shards are only found unreadable at training.
# Another version: PYARROW_VERSION=26.0.1 findings/arrow_tensor_permutation.sh
set -euo pipefail
packages=(
  "pyarrow==${PYARROW_VERSION:-25.0.1}"
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
import pyarrow as pa
import pyarrow.parquet as pq


def returns(view):
    """How a view comes back from an Arrow tensor array: equal, other values, or refused."""
    array = pa.FixedShapeTensorArray.from_numpy_ndarray(view)
    pq.write_table(pa.table({"x": array}), "x.parquet")
    stored = pq.read_table("x.parquet")["x"].combine_chunks()
    print(f"given {view.shape}, stored {stored.type.shape} with permutation "
          f"{stored.type.permutation}: ", end="")
    try:
        answer = stored.to_numpy_ndarray()
    except pa.ArrowInvalid as error:
        print(f"refused when read: {error}")
        return "refused"
    if np.array_equal(answer, view):
        print("comes back equal")
        return "equal"
    rotated = answer.shape == view.shape and np.array_equal(answer, view.transpose(0, 3, 1, 2))
    print(f"comes back as {answer.shape} with other values, its axes rotated: {rotated}")
    return "rotated" if rotated else "other values"


def images_NHWC(height, width):
    return np.arange(2 * height * width * 3, dtype=np.float32).reshape(2, height, width, 3)


seen = [returns(images_NHWC(32, 32).transpose(0, 2, 1, 3)),
        returns(images_NHWC(3, 3).transpose(0, 3, 1, 2)),
        returns(images_NHWC(32, 32).transpose(0, 3, 1, 2))]
same = seen == ["equal", "rotated", "refused"]
raise SystemExit(None if same else f"changed: {seen}")
PYTHON
