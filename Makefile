# Two commands need nothing else first: `make play` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ARGS ?=

.PHONY: help play test test-slow lint format bench serve setup clean
.DEFAULT_GOAL := help

help:
	@echo "make play       play a whole small game on embedded data and write its report"
	@echo "make test       run all tests"
	@echo "make test-slow  also run real training on MNIST and CIFAR-10 (long; fetches data)"
	@echo "make lint       format, lint and type checks"
	@echo "make bench      print every measured figure as one table"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Molehunt needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check \
		--editable '.[dev,zoo,dp]'
	@touch $(READY)

play: $(READY)
	$(BIN)/molehunt play $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto -m "not slow" $(ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@# Apart, as benchmarks and tests have files of the same names.
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	$(BIN)/python benchmarks/show.py $(ARGS)

serve:
	@echo "There is no server yet: this version plays on one machine (make play)."; exit 1

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
