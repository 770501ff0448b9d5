# make quickstart      trains a small model on real text, evaluates it and samples from it
# make test            lint, format check and the tests, in less than five minutes on two cores
# make types           type check of the package; downloads pyright once
# make test-compilers  what the compilers for TPUs and GPUs make of it; downloads 500 MB of them once
# make test-docs       runs the examples of README.md and docs/
# make test-notebooks  executes the notebooks
# make test-experiments  makes the smallest runs of all experiments, in a few minutes
# make docs            builds the pages, notebooks and reference as a site in docs/_build/html
# make test-wheel      builds a wheel, and trains, evaluates and samples with nothing but it
# make test-all        all tests, those that take minutes too, with all of XLA's optimisations
#
# Each makes the environment it needs in .venv the first time, and only then.

PYTHON ?= python3
BIN := .venv/bin
ARCHITECTURE ?= retnet
WORKDIR ?= runs/quickstart_$(ARCHITECTURE)
CONFIG := configs/quickstart.py:$(ARCHITECTURE)
# Each model's better protocol; carried through a document of 33,000 tokens, a Transformer's cache
# takes minutes on a CPU.
PROTOCOL := $(if $(filter transformer,$(ARCHITECTURE)),window,stateful)

.PHONY: quickstart docs test test-docs test-notebooks test-experiments test-compilers test-wheel test-all lint types clean

quickstart: .venv/run
	$(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR)
	$(BIN)/python eval.py --workdir=$(WORKDIR) --protocol=$(PROTOCOL) --compressors
	$(BIN)/python generate.py --workdir=$(WORKDIR) --temperature=0.7 --max_tokens=150 \
	  --prompt="def read_lines(path):"

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint
	$(PYTEST) -m "not slow and not compilers"

# Two pages run at once, so one process of pytest is enough.
test-docs: .venv/dev
	$(BIN)/python -m pytest tests/test_docs_examples.py

test-notebooks: .venv/dev
	$(BIN)/python tests/run_notebooks.py

test-experiments: .venv/dev
	rm -f experiments/results/*_small.json
	$(BIN)/python -m experiments --budget=small
	$(BIN)/python -m pytest tests/test_experiments.py

# A warning of Sphinx, such as a link that leads nowhere, is an error.
docs: .venv/dev
	$(BIN)/python -m sphinx -b html -q -W --keep-going docs docs/_build/html
	@echo "docs/_build/html/index.html"

test-compilers: .venv/libtpu .venv/cuda
	PYTHONPATH=.venv/libtpu $(PYTEST) -m "compilers and not slow"

test-wheel: .venv/dev
	rm -rf .venv/wheel build && mkdir -p .venv/wheel/elsewhere
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir=.venv/wheel . && rm -rf build
	$(BIN)/python -m venv .venv/wheel/env
	.venv/wheel/env/bin/pip install --quiet .venv/wheel/*.whl
	cd .venv/wheel/elsewhere && ../env/bin/python -I ../../../tests/check_wheel.py

# Without the flags that tests/conftest.py sets otherwise.
test-all: lint .venv/libtpu .venv/cuda .venv/py312 .venv/fla .venv/gcs
	XLA_FLAGS= PYTHONPATH=.venv/libtpu $(PYTEST)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/pyright

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; name it with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "on Debian: apt-get install python3-venv"; exit 1; }

.venv/run: .venv/bin/python requirements.txt pyproject.toml
	$(BIN)/pip install --quiet --editable .
	@touch $@

.venv/dev: .venv/bin/python requirements.txt pyproject.toml
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@ .venv/run

# The compiler for TPUs, of the version that belongs to the installed jax; beside the environment and
# not in it, because jax would look for a TPU at every start.
.venv/libtpu: .venv/dev
	$(BIN)/pip install --quiet --no-deps --target=$@.unfinished "$$($(BIN)/python -c \
	  'import importlib.metadata as m; print(next(x for x in m.requires("jax") if x.startswith("libtpu")).split(";")[0])')"
	rm -rf $@ && mv $@.unfinished $@

# XLA's compiler for GPUs (250 MB to download), of the installed jax; beside the environment too.
.venv/cuda: .venv/dev
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
	  $(BIN)/pip install --quiet --no-deps --target=$@.unfinished \
	  jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version nvidia-cuda-nvcc-cu12
	rm -rf $@ && mv $@.unfinished $@

# For the test that fla computes an exported model's logits; beside the environment, because PyTorch is
# large. On Linux it comes with CUDA unless another package is named, such as TORCH=torch==2.13.0+cpu.
TORCH ?= torch
.venv/fla: .venv/dev
	$(BIN)/pip install --quiet --target=$@.unfinished "$(TORCH)" triton transformers flash-linear-attention
	rm -rf $@ && mv $@.unfinished $@

# Google Cloud Storage as fsspec reads it, and an emulator of it for the loopback address.
.venv/gcs: .venv/dev
	$(BIN)/pip install --quiet --target=$@.unfinished gcsfs gcp-storage-emulator
	rm -rf $@ && mv $@.unfinished $@

# Where there is a Python 3.12, the newest jax: its Pallas has an interpreter for GPU kernels.
.venv/py312: .venv/dev
	@for python in python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python; do \
	  if "$$python" -c "" 2>/dev/null; then \
	    rm -rf $@.unfinished && "$$python" -m venv $@.unfinished && \
	    $@.unfinished/bin/python -m pip install --quiet "jax>=0.11" flax hypothesis jaxtyping beartype \
	      pytest && mv $@.unfinished $@; exit; \
	  fi; \
	done; echo "no python3.12: the tests of Hopper kernels under Pallas's interpreter are left out"

clean:
	rm -rf .venv
