# Everything runs in .venv, which make builds by itself from requirements.lock.

PYTHON ?= python3
SIZE ?= full
UV_VERSION := 0.13.9

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Files are dealt to JOBS processes, more than cores because tests wait for processes to start; all
# tests that share a Ray or a server go to the same one.
JOBS ?= 3
PYTEST = $(BIN)/python -m pytest -rs --durations=10
PARALLEL = -n $(JOBS) --dist loadscope --no-loadscope-reorder

# Nothing that a test or the demo starts needs the network.
export RAY_USAGE_STATS_ENABLED ?= 0
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-isa test-gpu bench docs lint audit clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter (3.11 or newer) that .venv is made with"

setup: $(STAMP)  ## build .venv with every pinned requirement; does nothing when it is there

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 || true); allowed: Python 3.11 or" \
	    "newer, for example make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || echo "building $(VENV): several gigabytes, a few minutes, once"
	@test -x $(BIN)/python -a -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make a virtual environment; some systems keep that in a" \
	    "package of its own (python3-venv)" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## run the main job on real images, results in demo/; SIZE=small is quicker
	$(BIN)/partialhn demo --size $(SIZE)

test: setup  ## run the tests that take seconds; no network, no GPU
	$(PYTEST) $(PARALLEL) -m "not slow and not gpu"

test-all: setup  ## run the slow tests too
	$(PYTEST) $(PARALLEL) -m "not gpu"

test-isa: setup  ## run the tests that train once for each kind of processor this one can act as
	$(BIN)/python tests/isa.py $(JOBS)

test-gpu: setup  ## run the tests that need CUDA
	$(PYTEST) -m gpu

bench: setup  ## measure steps, memory, bytes, features, start-up, packing; QUICK=1: four minutes
	$(BIN)/python tests/bench/step.py --json bench.json $(if $(QUICK),--quick,--plot bench.svg)
	$(BIN)/python tests/bench/features.py --json bench.json $(if $(QUICK),--quick)
	$(if $(QUICK),,$(BIN)/python tests/bench/startup.py --json bench.json)
	$(if $(QUICK),,$(BIN)/python tests/bench/packing.py --json bench.json)

docs: setup  ## build the documentation in site/; it opens without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: setup  ## check licences and known vulnerabilities; 4: something could not be checked here
	$(BIN)/python tests/security/audit.py

clean:  ## remove .venv, what the demo made, and caches
	rm -rf $(VENV) demo site build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
