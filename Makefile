# Needs Python 3.10 or newer, make and git. Nothing else: everything is installed into .venv.
#   make train   run `ssd-edge train` on an embedded data set (add ARGS="data.path=FOLDER …")
#   make test    the test suite (make test-slow: the long tests, on real data where it is present)
PYTHON ?= python3
BIN := .venv/bin
.DELETE_ON_ERROR:
.PHONY: train test test-slow lint

# The stamp is written last, so that an interrupted installation is taken up again.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[train,export,device,dev]'
	touch $@

train: .venv/.installed
	$(BIN)/ssd-edge train $(ARGS)

test: .venv/.installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
