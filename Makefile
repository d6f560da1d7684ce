PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo demo-bundles test lint bench bench-batch bench-dispatch bench-memory bench-reads stress clean

setup: .venv/.ready

.venv/.ready: pyproject.toml infra/constraints.txt
	@command -v c++ >/dev/null || { echo "make setup: no C++ compiler found; pydensecrf2 (the extra 'crf') builds from source: install g++"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make setup: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or newer"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[crf,demo,dev]'
	@touch $@

demo: setup
	$(BIN)/terravox demo --out demo-out

demo-bundles: setup
	$(BIN)/python -m workflows.demo.train_bundles

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup
	$(BIN)/python -m pytest

bench: setup
	PYTHONPATH=tests $(BIN)/python -m benchmarks.throughput

bench-batch: setup
	PYTHONPATH=tests $(BIN)/python -m benchmarks.batch

bench-dispatch: setup
	PYTHONPATH=tests $(BIN)/python -m benchmarks.dispatch

bench-memory: setup
	PYTHONPATH=tests $(BIN)/python -m benchmarks.memory

bench-reads: setup
	PYTHONPATH=tests $(BIN)/python -m benchmarks.reads

stress: setup
	PYTHONPATH=tests $(BIN)/python -m stress.kill

clean:
	rm -rf .venv build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
