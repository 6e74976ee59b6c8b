# Everything a checkout needs. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# the models of tests and demo are tiny: one thread is faster than several
export OMP_NUM_THREADS ?= 1

.PHONY: demo check test test-slow test-gpu wheel clean

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[plot]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# The main job on the bundled model: what each method does to perplexity and retrieval.
demo: $(VENV)/.demo
	$(BIN)/hf-rope compare --methods none,linear,ntk,dynamic,yarn --factor 4 --lengths 1x,2x,4x,8x --output demo_report

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

test: $(VENV)/.dev
	$(BIN)/pytest --numprocesses auto

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m "slow and not gpu"

test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m gpu

wheel: $(VENV)/.dev
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist demo_report *.egg-info
