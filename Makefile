# Each target sets up what it needs in .venv; a second call does not install again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help quickstart test test-effects test-slow test-all gpu lint docs format clean

help:
	@echo "make quickstart  plant, measure, detect and remove a backdoor on handwritten digits"
	@echo "make test        contracts, oracles, errors and one effect per stage and modality (minutes)"
	@echo "make test-effects the effect of every method; make test-slow faults and long runs; make test-all everything"
	@echo "make gpu         ten more minutes of CIFAR-10 at full size on a GPU, results in results/ (GRID=..., MINUTES=...)"
	@echo "make lint        ruff, mypy and the import contracts; make format rewrites"
	@echo "make docs        the documentation as a site, in site/index.html"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "backdoorlab needs Python >= 3.11; say which one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamp's name is the extra that is installed: core, test, dev or docs.
$(VENV)/.installed-core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	@touch $@ $(VENV)/.installed-core

quickstart: $(VENV)/.installed-core
	$(BIN)/backdoorlab quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and (core_effect or not effect)"

test-effects: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "effect and not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest --timeout=1800 -m slow

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest --timeout=1800

# The same command again goes on where it stopped; each call begins no stage that would end after so many minutes.
MINUTES ?= 10
GRID ?= configs/gpu-core.yaml
gpu: $(VENV)/.installed-core
	$(BIN)/backdoorlab bench $(GRID) --device cuda --store results --minutes $(MINUTES) $(GPU_OPTIONS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache quickstart site
