PYTHON ?= python3
BIN := .venv/bin

BENCHMARKS := bench-aoi bench-average bench-batch bench-crf bench-crf-halo bench-crf-tune \
	bench-deep-memory bench-dispatch bench-equality bench-gpu-crf bench-gpu-segment \
	bench-memory bench-networks bench-reads bench-scene-crf \
	bench-scribbles bench-seams bench-throughput bench-work

.PHONY: setup demo demo-bundles test lint bench $(BENCHMARKS) stress clean

setup: .venv/.ready

.venv/.ready: pyproject.toml infra/constraints.txt $(wildcard pipeline/crf/native/*)
	@command -v c++ >/dev/null || { echo "make setup: no C++ compiler found; the CRF engine and its reference (the extra 'crf') are built here: install g++"; exit 2; }
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

bench: bench-throughput

# Options of a benchmark: make bench-throughput ARGS='--network resnet50'
$(BENCHMARKS): bench-%: setup
	PYTHONPATH=tests $(BIN)/python -m benchmarks.$(subst -,_,$*) $(ARGS)

bench-seams bench-throughput: .venv/.bench

.venv/.bench: .venv/.ready
	$(BIN)/python -m pip install --quiet --constraint infra/constraints.txt --editable '.[bench]'
	@touch $@

stress: setup
	PYTHONPATH=tests $(BIN)/python -m stress.kill

clean:
	rm -rf .venv build dist demo-out bench-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
