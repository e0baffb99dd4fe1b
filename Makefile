# Every target makes its virtual environment if there is none and installs what it needs; a second run starts at once.
# `make` alone lists the targets. PYTHON=python3.12 and VENV=/elsewhere choose the interpreter and the environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REQUIREMENTS := setup.py pyproject.toml constraints.txt
ARGS ?=

# DeepSpeed's compiled operators are neither needed nor built: no compiler has to be there.
export DS_BUILD_OPS := 0

.DEFAULT_GOAL := help
.PHONY: help quickstart test slurm lint format types bench faults gpu clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed ## Train a small model twice, plain and goldfish, and compare what each recites (ARGS="--seed 1")
	$(BIN)/megafish demo --overwrite $(ARGS)

test: $(VENV)/.installed-dev slurm ## Run the test suite (ARGS="tests/data -k blend" for a part of it)
	$(BIN)/python -m pytest $(ARGS)

slurm: ## Install Slurm, which the tests of cluster jobs start on this machine
	@bash launch/local_slurm.sh install || echo "without it the tests of Slurm jobs are skipped"

lint: $(VENV)/.installed-dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev ## Check type hints
	$(BIN)/mypy

bench: $(VENV)/.installed-dev ## Run every benchmark that needs no GPU (ARGS="--save" keeps the tables)
	@for script in $$(ls benchmarks/*.py | grep -v -e /common.py -e /prepare_pool.py -e _gpu.py -e /faults.py); do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

faults: $(VENV)/.installed-dev ## Kill, damage, fill and hang real runs for an hour and see that nothing is lost (ARGS="--kills 10")
	$(BIN)/python benchmarks/faults.py $(ARGS)

gpu: $(VENV)/.installed-dev ## Test the kernels on this machine's GPU and time them beside their peers (ARGS="--repeats 50")
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
		echo "make gpu: torch sees no CUDA device here. Nothing was tested, and nothing timed" >&2; exit 1; }
	@$(MAKE) --no-print-directory $(VENV)/.installed-bench
	$(BIN)/python -m pytest tests/gpu tests/kernels
	$(BIN)/python benchmarks/kernels_gpu.py --save $(ARGS)

clean: ## Remove the environment, caches and build output (runs/ is kept)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "megafish needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(REQUIREMENTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e .
	@touch $@

# The development environment holds all that the plain one does.
$(VENV)/.installed-dev: $(REQUIREMENTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@

# Liger and CCE, beside which benchmarks/kernels_gpu.py puts our kernels.
$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP) install -c constraints.txt -e '.[dev,bench]'
	@touch $@
