# `make demo` and `make test` work as the first command in a fresh clone: Python 3 and make are all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUNS := $(VENV)/.runs
# The torch of the default index brings gigabytes of CUDA on Linux. Where this index is out of reach, that one serves.
CPU := $(if $(filter Linux,$(shell uname -s)),--extra-index-url https://download.pytorch.org/whl/cpu --retries 1)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint types check test-slow test-oldest matrix bench clean
demo: $(RUNS)
	@$(BIN)/ckpt demo

test: lint types $(STAMP)
	$(BIN)/python -m pytest -n 2

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow tests/whole/test_budgets.py
	$(BIN)/python -m pytest -m slow --ignore=tests/whole/test_budgets.py
	CKPT_FUZZ=1 $(BIN)/python -m pytest -n 2 tests/whole/test_fuzz.py tests/whole/test_fuzz_commands.py tests/whole/test_fuzz_texts.py

# In an environment of its own, with the lowest versions that are allowed.
test-oldest:
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt $(CPU) torch
	.venv-oldest/bin/python -m pip install -q -c constraints-oldest.txt -e . pytest pytest-timeout hypothesis
	.venv-oldest/bin/python -m pytest tests/cli tests/build/test_build.py tests/formats/test_safetensors.py

# The same bytes over Pythons, versions, processors and settings: docs/ci.md. ARGS=--help says what there is.
matrix: $(STAMP)
	TORCH_OPTIONS='$(CPU)' $(BIN)/python -m tests.matrix $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# What running needs, and on top of that what developing needs.
$(RUNS): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt $(CPU) torch
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(STAMP): $(RUNS)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-matrix build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
