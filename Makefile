# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
TORCH  ?= 2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CACHE  := $(VENV)/share/madpo
PYTEST := $(BIN)/python -m pytest -n $(or $(WORKERS),2) --dist loadfile

# Deadlines end what hangs, and here other processes hold the cores: see tests/support/patience.py.
export MADPO_TEST_PATIENCE ?= 4

NEWEST := .venv-newest

.PHONY: demo test suite test-slow test-slurm test-faults test-newest test-gpu test-gpu-kernels bench docs lint types sizes clean
.DEFAULT_GOAL := test

# torch first: installed alone it takes the CPU build where the index offers one, so that no later
# package pulls in CUDA. A CUDA build of torch brings its own triton; a CPU build brings none.
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "madpo needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$(TORCH) -c constraints.txt numpy
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install -q triton==3.6.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# The rated sentences that some tests read, fetched once: no test asks a package index.
$(CACHE)/hutto_ICWSM_2014.tar.gz: | $(READY)
	$(BIN)/python -c 'import sys; from pathlib import Path; from madpo.trainer.data.rated_sentences import fetch; fetch(Path(sys.argv[1]))' $(CACHE)

demo: $(READY)  ## train MADPO on real preference data: two ZeRO-3 ranks, evaluation, export, report
	$(BIN)/madpo demo
	@echo 'next: source $(BIN)/activate; then the command is madpo, and docs/README.md says what to read'

test: lint  ## ruff, then pyright beside the suite without its slow part; WORKERS=2
	$(MAKE) --no-print-directory -k -j2 types suite

suite: $(READY) $(CACHE)/hutto_ICWSM_2014.tar.gz  ## pytest alone, without the slow part
	$(PYTEST) -m "not slow"

test-slow: $(READY) $(CACHE)/hutto_ICWSM_2014.tar.gz  ## what make test leaves out: peers, benchmarks, the demo, a recipe, other GPUs' code
	$(BIN)/pip install -q -c constraints.txt -e '.[slow]'
	$(PYTEST) -m slow

test-slurm: $(READY)  ## jobs of slurm/train.sbatch on a private Slurm; a part of it is in make test
	$(PYTEST) tests/slurm

test-faults: $(READY)  ## kill, freeze and damage real runs; a part of it is in make test
	$(PYTEST) tests/faults tests/trainer/checkpoints tests/trainer/zero3/test_restore.py

test-newest: $(CACHE)/hutto_ICWSM_2014.tar.gz  ## the suite with the newest versions that pyproject.toml allows, in an environment of its own
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install -q torch numpy
	$(NEWEST)/bin/python -c 'import triton' 2>/dev/null || $(NEWEST)/bin/pip install -q triton
	$(NEWEST)/bin/pip install -q -e '.[dev]'
	mkdir -p $(NEWEST)/share && cp -r $(CACHE) $(NEWEST)/share/
	$(NEWEST)/bin/pip list | grep -iE '^(torch|triton|deepspeed|transformers|datasets|peft) '
	$(NEWEST)/bin/python -m pytest -n $(or $(WORKERS),2) --dist loadfile -m "not slow"

test-gpu-kernels:  ## on a GPU: real vocabularies, sanitizer, no waiting; $(PYTHON) needs torch, triton, numpy, pytest
	MADPO_TEST_GPU=1 PYTHONPATH=typings $(PYTHON) -m pytest tests/kernels

test-gpu: $(READY)  ## on a GPU: the kernels, and attention and the training step; nothing to do without one
	$(MAKE) test-gpu-kernels PYTHON=$(BIN)/python
	MADPO_TEST_GPU=1 $(BIN)/python -m pytest tests/trainer/model/attention/test_backends_on_a_gpu.py tests/whole/test_waits.py

bench: $(READY)  ## the loss head against every peer that is installed; see docs/kernels.md
	$(BIN)/madpo bench

docs: $(READY)  ## the pages as a site, in build/site; a broken link fails
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## pyright, 2.3 GB of memory
	$(BIN)/pyright --pythonpath $(BIN)/python

sizes:  ## lines per file, longest first
	@git ls-files '*.py' | xargs wc -l | sort -rn | head -20

clean:  ## the environment and what was built
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info
