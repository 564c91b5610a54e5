# `make train` and `make test` do everything on a fresh machine: environment, build, run.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.10
OUT ?= runs/$(shell date +%Y%m%d-%H%M%S)
# Packages that the parity lane and the benchmarks compare with; their own pins are old, so without dependencies.
PEERS = galore-torch apollo-torch bitsandbytes

BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest
# One thread a worker: two thread pools on the same cores would wait for each other.
WORKERS ?= 2
SPREAD = OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS)
NATIVE = pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: train test test-all test-cpu test-interpret test-compile test-host test-parity test-gpu floors clean

train: $(VENV)/.ready
	$(BIN)/lowrank train --out $(OUT)

test: test-gpu test-parity test-host test-interpret test-compile test-cpu

# The same, with every variant of every kernel compiled (days) instead of a cover of at most 300 builds.
test-all: export LOWRANK_COMPILE = all
test-all: test

test-cpu: $(VENV)/.ready
	$(SPREAD) tests/cpu

# Kernels are either interpreted or compiled in a process, so these lanes do not share one.
test-interpret: $(VENV)/.ready
	TRITON_INTERPRET=1 $(SPREAD) tests/interpret

test-compile: $(VENV)/.ready
	$(PYTEST) tests/compile

test-host: $(VENV)/.ready
	$(PYTEST) tests/host

test-parity: $(VENV)/.ready
	$(SPREAD) tests/parity

# Skipped by name where there is no GPU. The interpreter's numerics tests run on the device here.
test-gpu: $(VENV)/.ready
	$(PYTEST) tests/gpu tests/interpret

floors: $(VENV)/.ready
	$(BIN)/lowrank bench floors

$(VENV)/.ready: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "setuptools>=77" "$(TORCH)" ninja "cmake>=3.25" "pybind11>=2.13"
	$(BIN)/pip install -q --no-build-isolation -e ".[test]"
	$(BIN)/pip install -q --no-deps $(PEERS)
	$(BIN)/lowrank info
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info lowrank_sys/*.so lowrank_sys/_build.json
