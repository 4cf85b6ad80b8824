# Two commands for a newcomer: `make serve` and `make test`. `make help` lists the rest.
# The environment lives in .venv; PYTHON picks the interpreter, MODEL what to serve.
# PIP_ARGS goes to every pip call, e.g. PIP_ARGS="--extra-index-url URL" for another torch build.

PYTHON ?= python3
MODEL ?= brook
PORT ?= 8000
SERVE_ARGS ?=
PYTEST_ARGS ?= -n auto --dist loadfile
PIP_ARGS ?=
PEERS_ARGS ?=
# For a machine with a GPU: the interpreter with its torch and Triton, used as it is, and the seconds
# that tests and benchmarks may take; together 8 minutes.
GPU_PYTHON ?= python3
GPU_TEST_SECONDS ?= 200
GPU_BENCH_SECONDS ?= 270
GPU_BENCH_ARGS ?=
# Who develops needs the native library: if it cannot be built, that is an error. On a machine
# without a C++ compiler: make test PENSTOCK_REQUIRE_NATIVE=0 (its tests are skipped then).
PENSTOCK_REQUIRE_NATIVE ?= 1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
REQUIRED := PENSTOCK_REQUIRE_NATIVE=$(PENSTOCK_REQUIRE_NATIVE)
CODE := src tests tools benchmarks setup.py
NATIVE := src/penstock/native/libpenstock_native.so
NATIVE_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name CMakeLists.txt)

.DEFAULT_GOAL := help
.PHONY: help serve test native check check-native format format-check lint types layering bench bench-peers test-gpu bench-gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "penstock needs Python 3.11+")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "hint: apt install python3-venv"; exit 1; }

# torch comes first and exactly: a looser wish may bring another build of it.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

# torch is a download of its own, and needed only where the native library could not be built.
$(VENV)/.serve: pyproject.toml constraints.txt $(NATIVE_SOURCES) | $(BIN)/python
	PENSTOCK_REQUIRE_NATIVE=0 $(PIP) -e '.[serve]'
	@test -e $(NATIVE) || { echo "The native library was not built (is there a C++ compiler?): installing torch."; \
	  $(MAKE) --no-print-directory $(VENV)/.torch; }
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(NATIVE_SOURCES) $(VENV)/.torch
	$(REQUIRED) $(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.serve

# The package builds its library when it is installed; this is quicker after a change in csrc/.
$(NATIVE): $(NATIVE_SOURCES) $(VENV)/.dev
	PENSTOCK_REQUIRE_NATIVE=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace

native: $(NATIVE) ## build the native CPU library anew after a change in csrc/

# Kernel tests under the sanitizers, and with clang where there is one.
check-native: $(VENV)/.dev ## run the kernels' own tests with gcc, clang and the sanitizers
	PATH="$(abspath $(BIN)):$$PATH" csrc/tests/run_all.sh

serve: $(VENV)/.serve ## install what is needed and serve MODEL (brook) on 127.0.0.1:PORT
	@$(BIN)/penstock serve $(MODEL) --port $(PORT) $(SERVE_ARGS)

test: $(VENV)/.dev ## install what is needed and run every test
	$(REQUIRED) $(BIN)/python -m pytest $(PYTEST_ARGS)

check: format-check lint types layering test ## everything that must be green

format: $(VENV)/.dev ## format the code
	$(BIN)/ruff format $(CODE)

format-check: $(VENV)/.dev
	$(BIN)/ruff format --check $(CODE)

lint: $(VENV)/.dev
	$(BIN)/ruff check $(CODE)

types: $(VENV)/.dev
	$(BIN)/mypy

layering: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_layering.py tests/test_budget.py tests/test_docs.py

bench: $(VENV)/.dev ## run every benchmark and write results/
	$(BIN)/python -m benchmarks

bench-peers: $(VENV)/.dev ## compare with other engines on this CPU; options in PEERS_ARGS, e.g. --quick
	PIP_ARGS='$(PIP_ARGS)' $(BIN)/python -m benchmarks.peers $(PEERS_ARGS)

# Nothing is installed and no network is needed. Without a GPU: a sentence, and status 69.
test-gpu: ## run the GPU suite with GPU_PYTHON and append to results/gpu-tests.jsonl
	PYTHONPATH=src:. $(GPU_PYTHON) tools/gpu_suite.py --seconds $(GPU_TEST_SECONDS)

bench-gpu: ## run the GPU benchmarks with GPU_PYTHON; options in GPU_BENCH_ARGS, e.g. --toy
	PYTHONPATH=src:. $(GPU_PYTHON) -m benchmarks.gpu --seconds $(GPU_BENCH_SECONDS) $(GPU_BENCH_ARGS)

# A test that fails must not cost the benchmarks, nor run beside them.
ifneq ($(filter test-gpu bench-gpu,$(MAKECMDGOALS)),)
MAKEFLAGS += --keep-going
.NOTPARALLEL:
endif

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
