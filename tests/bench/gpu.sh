#!/bin/sh
# Measures every goal for a GPU, and runs the tests that need one; under six minutes.
#
#   sh tests/bench/gpu.sh [FOLDER_OF_CIFAR10] [OPTIONS OF gpu.py]
#
# Prints a table with yes or no for each goal, and writes gpu.json. PYTHON names the interpreter;
# it needs torch, torchvision, timm, pyarrow and scikit-learn, but no network, Ray or MLflow.
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD"
if [ $# -gt 0 ] && [ -d "$1" ]; then
    folder=$1
    shift
    set -- --cifar10 "$folder" "$@"
fi
"$PYTHON" tests/bench/gpu.py "$@"
if "$PYTHON" -c 'import pytest' 2>/dev/null; then
    "$PYTHON" -m pytest -rs -p no:cacheprovider tests/unit/test_gpu.py || echo "tests/unit/test_gpu.py: NO"
else
    echo "tests/unit/test_gpu.py: not run, there is no pytest"
fi
