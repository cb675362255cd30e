# Needs Python 3.10 or newer, make and git. Everything is installed into .venv.
#   make train      run `ssd-edge train` on a bundled data set (add ARGS="data.path=FOLDER …")
#   make test       the test suite (make test-slow: the long tests, on real data where it is present)
#   make lint       ruff: rules and format          make format   apply them
#   make types      mypy --strict
#   make docs       build the documentation into site/ (make docs-serve: preview it)
#   make console    build what the page of `device serve` takes from npm again (needs Node.js 20 and npm)
#   make check      lint, types, docs and test, as in CI
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
.DELETE_ON_ERROR:
.PHONY: train test test-slow lint format types docs docs-serve console check

# The stamp is written last, so that an interrupted installation is taken up again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) -e '.[train,export,device,serve,mqtt,dev]'
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

# The results are committed, so that nobody needs npm to use them; the lock says what they are made from.
CONSOLE := device_runtime/serve/console
VENDORED ?= $(CONSOLE)
AXE ?= tests/device_runtime/serve
console:
	mkdir -p .cache/console
	cp $(CONSOLE)/vendor/package.json $(CONSOLE)/vendor/package-lock.json $(CONSOLE)/vendor/build.mjs .cache/console/
	cd .cache/console && npm ci --ignore-scripts --no-audit --no-fund && npm run --silent build
	cp .cache/console/vendor.js $(VENDORED)/
	cp .cache/console/node_modules/axe-core/axe.min.js $(AXE)/

check: lint types docs test
