# Two commands set up a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := $(VENV)/.extras
WORKERS ?= 2
# A file's tests stay together, because they share fixtures that are costly to make. Each worker has one thread, because
# workers with more threads wait for one another. By default, files with many tests would come first and files with few
# long tests last, and one worker would finish alone.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help demo test test-long test-all check docs bench cards clean

help:
	@echo "make demo      set up, then train, evaluate, draw and export a small segmentor (about 6 minutes)"
	@echo "make test      set up, then run the quick tests (about 10 minutes on 2 cores)"
	@echo "make test-long the tests that export, compile, train or start processes (about 15 minutes)"
	@echo "make test-all  all tests, also the slow ones (hours)"
	@echo "make check     ruff: lint and format; mypy: the types of the public names"
	@echo "make docs      the documents as a site, in build/site"
	@echo "make bench     speed here, as ratios to named peers; on a GPU first the kernels' tests, then model_cards/results/*_gpu.csv"
	@echo "               (make bench OPTIONS=--quick for fewer shapes)"
	@echo "make cards     regenerate the tables of README.md, docs/ and model_cards/"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "terrazzo needs Python >= 3.10; this is " + sys.version.split()[0] + " (set PYTHON=python3.x)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@

demo: $(STAMP)
	$(BIN)/terrazzo demo

test: $(STAMP)
	$(PYTEST) -m "not slow and not long"

test-long: $(STAMP)
	$(PYTEST) -m "long and not slow"

test-all: $(EXTRAS)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@mkdir -p .cache/types && ln -sfn "$(CURDIR)" .cache/types/terrazzo
	$(BIN)/mypy

# What the site and the slow tests need beyond `make test`.
$(EXTRAS): $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[all,docs,ecosystem]'
	@touch $@

docs: $(EXTRAS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# On a GPU every Triton kernel is tested against the reference before anything is timed, and the rows are kept.
bench: $(STAMP)
	@set -e; suffix=; \
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest tests/kernels/test_*_gpu.py; suffix=_gpu.csv; \
	fi; \
	operators=$$($(BIN)/terrazzo bench --list operators); families=$$($(BIN)/terrazzo bench --list families); \
	for name in $$operators $$families; do \
		$(BIN)/python -m terrazzo bench $$name $${suffix:+--out model_cards/results/$$name$$suffix} $(OPTIONS); \
	done

cards: $(STAMP)
	$(BIN)/terrazzo cards

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis demo
