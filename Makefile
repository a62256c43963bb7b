# Two commands: `make train` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/laptop
DATA ?= data/sotu
# More than the two cores that CI has: tests that wait for processes leave them free.
JOBS ?= 3
SEED ?= 0
PROMPT ?= The old house
DEVICE ?= cpu
TAG ?= mmfree:$(DEVICE)
BIN := $(VENV)/bin
# In the order of the files: by their number of tests, the slowest would be alone at the end.
SPREAD := --dist loadfile --no-loadscope-reorder
# Else every worker and every process that a test starts would compile all modules anew.
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest -n $(JOBS) $(SPREAD)

.DEFAULT_GOAL := help
# Half an environment, as of a Python without ensurepip, is made anew the next time.
.DELETE_ON_ERROR:
.PHONY: help train sample demo test lint format typecheck unit quick tutorials fuzz load torch gpu aot aot-tpu wheel docs docs-serve linkcheck image clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(VENV)/.train ## Train a small MatMul-free LM on the State of the Union addresses (10 minutes, 2 cores)
	@test -f $(DATA)/index.json || $(BIN)/mmfree tokenizer train --corpus sotu --heldout-fraction 0.05 --vocab-size 2048 --out $(DATA)-tokenizer
	$(BIN)/mmfree data prepare --corpus sotu --heldout-fraction 0.05 --tokenizer $(DATA)-tokenizer --out $(DATA)
	$(BIN)/mmfree train --config experiments/configs/laptop.yaml --run-dir $(RUN) --data.paths $(DATA)
	@echo "The run is in $(RUN): loss_curve.png, sample.txt, metrics.jsonl, config.yaml, checkpoints/, tensorboard/"
	@echo "make sample lets it write; source $(BIN)/activate puts its commands on the PATH"

sample: $(VENV)/.train ## Let the trained model write
	$(BIN)/mmfree generate --model $(RUN) --prompt "My fellow citizens," --max-new-tokens 200 --stream

# By the environment: what a user writes is text, not a piece of a shell's line.
demo: export DEMO_PROMPT = $(value PROMPT)
demo: $(VENV)/.train ## Let the trained model of the repository write a paragraph (PROMPT=)
	$(BIN)/mmfree generate --model experiments/results/models/61M --prompt "$$DEMO_PROMPT" --temperature 0.8 --stream

test: lint typecheck unit wheel ## What CI runs first: lint, types, all tests, wheel
	@echo "All checks passed: ruff, pyright, pytest, wheel (dist/)"

lint: $(VENV)/.dev ## Lint and check the format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(VENV)/.dev ## Check the types of the public packages
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(VENV)/.dev ## Run the tests, slow ones included
	$(PYTEST)

quick: $(VENV)/.dev ## Run the tests without the slow ones
	$(PYTEST) -m "not slow"

tutorials: $(VENV)/.dev ## Follow the tutorials of docs/ as their reader would, with fewer steps
	$(BIN)/pytest -m tutorial tests/docs

fuzz: $(VENV)/.dev ## Try malformed commands and damaged files at random (10 minutes at most; SEED=0)
	PYTHONPATH=tests/support $(BIN)/python -m fuzz --seed $(SEED)

load: $(VENV)/.dev ## Load a server with 1,500 requests, 64 at once, some of which misbehave (two minutes)
	PYTHONPATH=tests/support $(BIN)/python -m server_load --seed $(SEED)

torch: $(VENV)/.torch ## Load exports in PyTorch, transformers and lm-eval (an environment of its own, 2 GB)
	$(VENV)/torch/bin/pytest tests/interop_torch

aot: $(VENV)/.aot ## Compile the kernels for a TPU v5e and GPUs without having any (installs 3 GB)
	JAX_PLATFORMS=cpu $(BIN)/pytest -m aot

aot-tpu: $(VENV)/.tpu ## Compile for a TPU v5e alone (installs 0.7 GB)
	JAX_PLATFORMS=cpu $(BIN)/pytest -m aot -k "tpu or v5e"

# Without conftest.py, whose settings of XLA are a CPU's.
gpu: $(VENV)/.dev ## Check the kernels and gradients on an NVIDIA GPU (install jax[cuda12] or jax[cuda13] first)
	$(BIN)/pytest --noconftest -m gpu tests/on_gpu

wheel: $(VENV)/.dev ## Build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir dist .

# An environment of its own, so that what Sphinx needs stays out of the tests'.
SPHINX := $(VENV)/docs/bin/python -m sphinx --fail-on-warning --keep-going
# All anew: what a notebook calls may have changed where its text did not, and a page may have gone.
docs: $(VENV)/.docs ## Run the notebooks and build the documentation site into docs/_build/html; warnings are errors
	rm -rf docs/_build/html
	$(SPHINX) -b html docs docs/_build/html
	$(VENV)/docs/bin/python docs/site_pages/check.py docs/_build/html
	@echo "The site is in docs/_build/html/index.html"

# What the site shows from outside of docs/.
WATCHED := $(wildcard *.md) pallas_kernels/README.md experiments/notebooks experiments/results/backward8 \
	experiments/results/exchange
docs-serve: $(VENV)/.docs ## Show the site at http://127.0.0.1:8001 and rebuild it, and run notebooks, as they change
	$(VENV)/docs/bin/sphinx-autobuild --port 8001 --ignore '*/docs/generated/*' $(WATCHED:%=--watch %) \
		docs docs/_build/html

linkcheck: $(VENV)/.docs ## Check the site's links to other sites (needs the network)
	$(SPHINX) -D nb_execution_mode=off -b linkcheck docs docs/_build/linkcheck

image: ## Build a container image from the wheel (DEVICE=cpu, cuda12, cuda13 or tpu; TAG=)
	rm -f dist/mmfree_jax-*.whl
	$(MAKE) wheel
	docker build --build-arg DEVICE=$(DEVICE) --tag $(TAG) .

clean: ## Remove the environment and build outputs (runs/ and data/ stay)
	rm -rf $(VENV) build dist docs/_build docs/generated .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1): Python 3.11 or newer is needed, name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[corpus]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[corpus,eval,dev]'
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/docs
	$(VENV)/docs/bin/python -m pip install --quiet --editable '.[notebooks,docs]'
	@touch $@

# Of PyTorch the build for CPUs, where its own index can be reached.
TORCH := torch==2.13.*
$(VENV)/.torch: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/torch
	$(VENV)/torch/bin/python -m pip install --quiet --retries 0 '$(TORCH)' \
		--extra-index-url https://download.pytorch.org/whl/cpu || \
		$(VENV)/torch/bin/python -m pip install --quiet '$(TORCH)'
	$(VENV)/torch/bin/python -m pip install --quiet --editable '.[corpus,eval]' 'transformers>=5.24,<6' \
		accelerate 'pytest>=8' 'pytest-timeout>=2.3'
	@touch $@

# JAX's compilers for devices that are absent: libtpu, and the CUDA plugin without its libraries.
$(VENV)/.tpu: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet 'jax[tpu]'
	@touch $@

$(VENV)/.aot: $(VENV)/.tpu
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	$(BIN)/python -m pip install --quiet --no-deps jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version \
		nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-cupti-cu12 nvidia-nvjitlink-cu12 nvidia-cuda-nvrtc-cu12
	@touch $@
