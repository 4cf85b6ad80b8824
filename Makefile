# Two commands for a newcomer: `make serve` and `make test`. `make help` lists the rest.
# The environment lives in .venv; PYTHON picks the interpreter, MODEL what to serve.
# PIP_ARGS goes to every pip call, e.g. PIP_ARGS="--extra-index-url URL" for another torch build.

PYTHON ?= python3
MODEL ?= brook
PORT ?= 8000
SERVE_ARGS ?=
PYTEST_ARGS ?= -n auto --dist loadfile
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
CODE := src tests tools benchmarks

.DEFAULT_GOAL := help
.PHONY: help serve test check format format-check lint types layering bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "penstock needs Python 3.11+")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "hint: apt install python3-venv"; exit 1; }

# torch comes first and exactly: a looser wish may bring another build of it.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.serve: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[serve]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.serve

serve: $(VENV)/.serve ## install what is needed and serve MODEL (brook) on 127.0.0.1:PORT
	@$(BIN)/penstock serve $(MODEL) --port $(PORT) $(SERVE_ARGS)

test: $(VENV)/.dev ## install what is needed and run every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

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

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
