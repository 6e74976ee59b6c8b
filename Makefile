# Run `make demo` or `make test` in a fresh checkout; each installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# the models of the tests and the demo are tiny, so one thread is faster than several
export OMP_NUM_THREADS ?= 1

.PHONY: demo check test test-quick test-slow test-gpu test-releases mutants wheel clean

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[plot]"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# Compare methods on the bundled model: perplexity and pass key retrieval.
demo: $(VENV)/.demo
	$(BIN)/hf-rope compare --methods none,linear,ntk,dynamic,yarn --factor 4 --lengths 1x,2x,4x,8x --output demo_report

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: $(VENV)/.dev
	$(BIN)/pytest --numprocesses auto

# The tests that are not marked `sweep`, without the rooms of long runs (commands, comparisons,
# training, scripts), which are not even imported: under 90 seconds on two cores.
LONG := cli evals finetune rotary/test_mrope_axes.py test_examples.py test_packaging.py
test-quick: $(VENV)/.dev
	$(BIN)/pytest --numprocesses auto -m "not sweep and not slow and not gpu" $(LONG:%=--ignore tests/%)

test-slow: $(VENV)/.dev
	$(BIN)/pytest -m "slow and not gpu"

test-gpu: $(VENV)/.dev
	$(BIN)/pytest -m gpu

# The core of the tests on other releases of transformers, each in an environment of its own.
test-releases: $(VENV)/.dev
	$(BIN)/python benchmarks/releases.py $(RELEASES)

# Mistakes put into the code one at a time, and how many the tests catch: `make mutants ROOMS=cache`.
mutants: $(VENV)/.dev
	nice $(BIN)/python benchmarks/mutants.py --record $(ROOMS)

wheel: $(VENV)/.dev
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .releases build dist demo_report *.egg-info
