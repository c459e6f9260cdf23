# Every target makes what it needs; nothing else has to be installed but Python 3.11 or newer.
#   make train ARGS="trainer.max_steps=50 run_name=short"     passes options on
#   make test  ARGS="tests/unit -k router"

ARGS ?=
# The first Python that is new enough; override with `make PYTHON=…`.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help train test bench bench-check bench-gpu test-faults lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moe-lm needs Python 3.11 or newer; none was found. Install one, or: make PYTHON=/path/to/python"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

train: $(READY)  ## train the default experiment, evaluate, sample and export
	@$(BIN)/moe-lm pretrain $(ARGS)

test: $(READY)  ## run the test suite, files of it side by side in two processes
	@$(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

bench: $(READY)  ## training steps against transformers' Mixtral, in one run
	@$(BIN)/python scripts/benchmark.py $(ARGS)

bench-check: $(READY)  ## whether a fast path has lost its lead over its reference
	@$(BIN)/python scripts/benchmark_components.py --check

bench-gpu: $(READY)  ## on a machine with a GPU: its tests, its kernels one by one, the ladder of models (fifteen minutes)
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or sys.exit('no CUDA device is visible here')"
	@$(BIN)/python -m pytest tests/gpu tests/parity/test_triton_kernels.py
	@$(BIN)/python scripts/benchmark_gpu_kernels.py
	@$(BIN)/python scripts/benchmark_gpu.py $(ARGS)

test-faults: $(READY)  ## run the whole fault matrix (a quarter of an hour)
	@MOE_LM_FAULTS=full $(BIN)/python -m pytest tests/faults $(ARGS)

lint: $(READY)  ## ruff (lint and format check), mypy, clang-format, import layering
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror moe_lm/kernels/*.cpp moe_lm/kernels/*.inc
	@$(BIN)/python -m pytest tests/unit/test_layers.py

format: $(READY)  ## format the code and mend what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i moe_lm/kernels/*.cpp moe_lm/kernels/*.inc

clean:  ## remove environment, caches and build products; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
