# Needs python3 >= 3.10 with venv (and g++ for DeepSpeed's tests); `make train` is the main job.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
PIP = -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Megatron-core 0.19 needs an environment of its own: its wheels for 3.11 declare a newer Python.
MEGATRON_VENV ?= .venv-megatron-0.19
MEGATRON_TESTS = tests/integrations/test_megatron*.py
RANKS ?= 2
# Extra flags for the trainer: make train ARGS="--optimizer adamw"
ARGS ?=

.PHONY: setup setup-integrations train test test-slow test-long test-gpu bench-gpu fuzz lint

setup: $(VENV)/.installed

# The build tools come first, so that the editable install needs no isolated environment of its own.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) setuptools wheel torch
	$(BIN)/python $(PIP) --no-build-isolation -e '.[test]'
	touch $@

setup-integrations: $(VENV)/.integrations $(MEGATRON_VENV)/.installed

# DeepSpeed compiles its gloo helper at the first start, under a lock file that a killed process leaves behind, and
# every later start waits for it without a word. So it is built here. (pip's cache would give a wheel without it.)
$(VENV)/.integrations: $(VENV)/.installed
	DS_BUILD_OPS=0 DS_BUILD_SHM_COMM=1 $(BIN)/python $(PIP) --no-build-isolation --no-cache-dir deepspeed
	$(BIN)/python $(PIP) --no-build-isolation megatron-core psutil
	touch $@

$(MEGATRON_VENV)/.installed: tests/integrations/setup_megatron_019.sh constraints.txt
	tests/integrations/setup_megatron_019.sh $(MEGATRON_VENV) $(PYTHON)
	touch $@

# One thread per rank: two ranks share a small machine best that way. The MALLOC variables tell glibc to keep
# what is freed: fetching the same pages again in every step costs an eighth of it.
KEEP_MEMORY = MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
# torchrun kills ranks that take longer than this to save after Ctrl-C; its own limit is 30 s.
STOP_SECONDS ?= 600
train: setup
	OMP_NUM_THREADS=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=$(STOP_SECONDS) $(KEEP_MEMORY) \
	    $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m launch.pretrain \
	    --run-dir runs/train-$$(date +%Y%m%d-%H%M%S) $(ARGS)

# Two tests at a time, of different files: those of one file may share a spawn. In the files' order, for the long
# ones come first in it.
BY_TWO = -n 2 --dist loadfile --no-loadscope-reorder
test:
	$(MAKE) --jobs 2 setup-integrations
	$(MAKE) lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BY_TWO)
	OMP_NUM_THREADS=1 $(MEGATRON_VENV)/bin/python -m pytest $(BY_TWO) $(MEGATRON_TESTS)

# The long ones, which `make test` leaves out.
test-slow: setup-integrations
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# 2,000 steps with skips and resumes: equal to torch's optimizers, with memory, files and threads flat.
test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/faults/test_long_run.py

# Generated plans and runs, for two hours: make fuzz FUZZ="--minutes 600 --seed 7"
FUZZ ?= --minutes 120
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(FUZZ)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu

# Everything that wants GPUs: tests, a step under torch's race detector, and measurements for perf/results.
GPUS ?= $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
GPU_RESULTS = perf/results/gpu-
ON_GPUS = $(BIN)/torchrun --standalone --nproc_per_node $(GPUS) -m perf.step --device cuda
bench-gpu: SHELL = /bin/bash -o pipefail
bench-gpu: test-gpu
	@test $(GPUS) -ge 2 || { echo "error: perf.step wants two GPUs or more, here are $(GPUS)" >&2; exit 1; }
	$(BIN)/python -m perf.newton_schulz --device cuda --tune $(GPU_RESULTS)kernels.json
	TORCH_CUDA_SANITIZER=1 $(ON_GPUS) --ours --layers 1 --rounds 1
	$(BIN)/python -m perf.newton_schulz --device cuda --json $(GPU_RESULTS)newton_schulz.json \
	    | tee $(GPU_RESULTS)newton_schulz.txt
	$(ON_GPUS) --json $(GPU_RESULTS)step.json | tee $(GPU_RESULTS)step.txt
	$(BIN)/python -m perf.report

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch tests/integrations/*.sh tests/multihost/slurm/sc* .ci/run
