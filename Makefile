# Needs python3 >= 3.10 with venv, and nothing else; `make train` is the main job.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
RANKS ?= 2
# Extra flags for the trainer: make train ARGS="--optimizer adamw"
ARGS ?=

.PHONY: setup train test test-gpu lint

setup: $(STAMP)

# The build tools come first, so that the editable install needs no isolated environment of its own.
$(STAMP): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

# One thread per rank: two ranks share a small machine best that way. The MALLOC variables tell glibc to keep
# what is freed: fetching the same pages again in every step costs an eighth of it.
KEEP_MEMORY = MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
train: setup
	OMP_NUM_THREADS=1 $(KEEP_MEMORY) $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m launch.pretrain \
	    --run-dir runs/train-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: lint
	$(BIN)/python -m pytest

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
