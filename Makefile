# make setup   make .venv with the command togi in it
# make demo    set up, build a small model, train it with reinforcement learning, show the result
# make test    set up and run the tests of every change
# make test-all   those and the long ones: several nodes, chains of commands, learning curves
# make lint    formatter, linter and type checker

PYTHON ?= python3
VENV := .venv
SEED ?= 1
SLOWEST := --durations 20 --durations-min 5
# A test that ends its process fails, and ends the session; pytest would start it again, without end.
SHARED := -n 2 --max-worker-restart 0
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-all lint bench clean

setup:
	@$(PYTHON) scripts/setup.py $(VENV)

demo: setup
	@$(VENV)/bin/python examples/demo/prepare.py
	@TOGI=$(VENV)/bin/togi examples/demo/run.sh --seed $(SEED)

test test-all: export OMP_NUM_THREADS := 1
test: setup
	@$(VENV)/bin/python examples/demo/prepare.py
	@$(VENV)/bin/python -m pytest $(SLOWEST) $(SHARED) --dist worksteal -m "busy and not large" tests/e2e tests/equal
	@$(VENV)/bin/python -m pytest $(SLOWEST) $(SHARED) --dist loadfile --no-loadscope-reorder -m "not busy and not large" tests

test-all: test
	@$(VENV)/bin/python -m pytest $(SLOWEST) -m large tests

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: setup
	@$(VENV)/bin/python examples/demo/prepare.py
	@$(VENV)/bin/python benchmarks/rl_step.py

clean:
	rm -rf $(VENV) build dist *.egg-info
