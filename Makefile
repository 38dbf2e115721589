# Two commands do everything on a fresh machine: `make train` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: train test test-all lint clean help

help:
	@echo "make train     set up .venv and run the main job (about a minute on 2 cores once the packages are there)"
	@echo "make test      set up .venv and run the quick tests"
	@echo "make test-all  the quick and the slow tests"
	@echo "make lint      ruff and mypy --strict"

train: $(VENV)/.ready
	$(BIN)/stowage train

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest

test-all: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m "not gpu and not network"

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing stowage and its packages into $(VENV) ..."
	$(PIP) -e .
	@touch $@

# the authors' packages are only compared with; their own dependencies (tensorly and old pins) are not needed for that
$(VENV)/.ready-test: pyproject.toml constraints.txt | $(VENV)/.ready
	@echo "installing what the tests need into $(VENV) ..."
	$(PIP) -e '.[test]'
	$(PIP) --no-deps galore-torch apollo-torch q-galore-torch fira
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
