# Few words; each works on a fresh clone. Everything is installed into .venv, at the versions of constraints.txt.
.PHONY: setup demo test test-faults test-peers fuzz lint bench clean

PYTHON ?= python3
COUNT ?= 10
CASES ?= 100000
SEED := $(or $(SEED),$(shell date +%s))
BIN := .venv/bin
STAMP := .venv/.installed

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "regrow needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[trainer,dev]'
	@$(BIN)/python -m compileall -q orchestrator agents
	@touch $(STAMP)

demo: setup  ## lose a node, get it back, and compare with a run that was left alone
	$(BIN)/regrow run deploy/examples/gpt/job.yaml --nodes 4 --fail "node-2@step=40" --return "node-2@step=80" --compare

test: setup
	$(BIN)/python -m pytest -m "not fault and not peer" -n 2 --dist loadfile

test-faults: setup  ## break whole clusters, every way COUNT times in a row
	$(BIN)/python -m pytest -m fault --count $(COUNT)

test-peers: setup  ## compare with real runs of DeepSpeed; the first time installs it beside regrow and makes the runs
	$(BIN)/python -m pytest -m peer

fuzz: setup  ## damage checkpoints of every format CASES times, each time in other ways
	@echo "the same cases again: make fuzz CASES=$(CASES) SEED=$(SEED)"
	REGROW_FUZZ_CASES=$(CASES) $(BIN)/python -m pytest tests/fuzz --hypothesis-seed=$(SEED) --timeout 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python -m tests.bench

clean:
	rm -rf .venv runs build *.egg-info
