# `make demo` and `make test` need python3 (3.11 or newer) and nothing else that is installed beforehand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types clean
.DEFAULT_GOAL := test

# The versions are all in requirements-pinned.txt, the build backend's too: hence no build isolation.
# Given as a constraint, the file also lets pip refuse pins that left the ranges of pyproject.toml.
$(STAMP): requirements-pinned.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(f"The pinned versions need Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: choose another with PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements-pinned.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -c requirements-pinned.txt -e '.[examples,test,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m examples.demo

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(STAMP)
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV)
