# Two commands do all the set-up of a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-all check bench cards clean

help:
	@echo "make demo      set up, then train, evaluate, draw and export a small segmentor (about 6 minutes)"
	@echo "make test      set up, then run the tests (under 20 minutes on 2 cores)"
	@echo "make test-all  the slow tests too"
	@echo "make check     ruff: lint and format"
	@echo "make bench     speed of the operators here, as ratios to named peers"
	@echo "make cards     regenerate the tables of README.md and model_cards/"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "terrazzo needs Python >= 3.10; this is " + sys.version.split()[0] + " (set PYTHON=python3.x)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@

demo: $(STAMP)
	$(BIN)/terrazzo demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(STAMP)
	$(BIN)/python -m pytest

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)
	$(BIN)/terrazzo bench neighborhood_attention

cards: $(STAMP)
	$(BIN)/terrazzo cards

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo
