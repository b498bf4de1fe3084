# make setup   make .venv with the command togi in it
# make demo    set up, build a small model, train it with reinforcement learning, show the result
# make test    set up and run all tests
# make test-large   the few tests that need minutes or 16 GB
# make lint    formatter, linter and type checker

PYTHON ?= python3
VENV := .venv
SEED ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-large lint bench clean

setup:
	@$(PYTHON) scripts/setup.py $(VENV)

demo: setup
	@$(VENV)/bin/python examples/demo/prepare.py
	@TOGI=$(VENV)/bin/togi examples/demo/run.sh --seed $(SEED)

test: export OMP_NUM_THREADS := 1
test: setup
	@$(VENV)/bin/python examples/demo/prepare.py
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "busy and not large" tests
	@$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not busy and not large" tests

test-large: setup
	@$(VENV)/bin/python -m pytest -m large tests/e2e

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: setup
	@$(VENV)/bin/python examples/demo/prepare.py
	@$(VENV)/bin/python benchmarks/rl_step.py

clean:
	rm -rf $(VENV) build dist *.egg-info
