# Needs Python 3.10 or newer, make and git. Everything is installed into .venv.
#   make train      run `ssd-edge train` on a bundled data set (add ARGS="data.path=FOLDER …")
#   make test       the test suite (make test-slow: the long tests, on real data where it is present)
#   make lint       ruff: rules and format          make format   apply them
#   make types      mypy --strict
#   make docs       build the documentation into site/ (make docs-serve: preview it)
#   make check      lint, types, docs and test, as in CI
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
.DELETE_ON_ERROR:
.PHONY: train test test-slow lint format types docs docs-serve check

# The stamp is written last, so that an interrupted installation is taken up again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[train,export,device,serve,dev]'
	touch $@

.venv/.installed-docs: .venv/.installed
	$(INSTALL) -e '.[docs]'
	touch $@

train: .venv/.installed
	$(BIN)/ssd-edge train $(ARGS)

test: .venv/.installed
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/.installed
	$(BIN)/mypy

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

check: lint types docs test
