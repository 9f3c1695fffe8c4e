# Two commands for a newcomer:  make quickstart   and   make test.  Both make their own venv, and may be run again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart results sensitivity gpu test test-slow test-oldest lint types clean

help:
	@echo "make quickstart   four small trainings on real images, compared: a few minutes on 2 cores"
	@echo "make test         the tests"
	@echo "make test-slow    the tests that take longer"
	@echo "make test-oldest  the tests with the oldest versions that setup.cfg allows, on the oldest Python found: 8 GB of disk"
	@echo "make lint types   ruff and mypy"
	@echo "make results      the quickstart with three seeds, in bf16 and in emulated FP8"
	@echo "make sensitivity  weight, tau and power of the penalty, ViT and Swin: about three hours on one core; may be interrupted"
	@echo "make gpu          what only a GPU can show, in about 15 minutes, into gpu_report/; tiny models without one"
	@echo "make clean        delete the venv and everything the quickstart made"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is too old or missing: Python 3.10 or newer is needed (make PYTHON=python3.11 ...)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "make: cannot create a venv: install python3-venv (Debian, Ubuntu: apt install python3-venv), and check the disk"; exit 1; }

# One stamp a set of extras: installed again only when the requirements change.
$(VENV)/.installed-%: setup.cfg pyproject.toml | $(BIN)/python
	@echo "Installing tweo_timm[$*] into $(VENV): torch is large, this takes a minute or more"
	@$(BIN)/python -m pip install --quiet --editable '.[$*]' || \
	  { echo "make: installation failed: check the network (pip has to reach PyPI) and the disk (6 GB free; see the message above)"; exit 1; }
	@touch $@

quickstart: $(VENV)/.installed-quickstart
	@$(BIN)/python -m tweo_timm.quickstart

results: $(VENV)/.installed-quickstart
	@$(BIN)/python -m tweo_timm.quickstart --output quickstart --seeds 0 1 2
	@$(BIN)/python -m tweo_timm.quickstart --output quickstart --seeds 0 1 2 --fp8

sensitivity: $(VENV)/.installed-quickstart
	@$(BIN)/python benchmarks/sensitivity.py

# With the venv if there is one: a machine with a GPU has its own torch, and may be unable to install anything.
gpu:
	@python=$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)); $$python benchmarks/gpu_report.py

# Two processes of one thread each: the tests' models are too small to share.
test: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# The oldest versions: torch alone is 6 GB with its CUDA libraries. TESTS=... runs some of them.
OLDEST := .venv-oldest
PYTHON_OLDEST ?= $(shell for p in python3.10 $(HOME)/.pyenv/versions/3.10.*/bin/python python3.11 python3.12 python3; do \
  $$p -c '' 2>/dev/null && echo $$p && break; done)

$(OLDEST)/.installed: setup.cfg tests/oldest.txt
	@echo "Installing the versions of tests/oldest.txt for $(PYTHON_OLDEST) into $(OLDEST): 8 GB, some minutes"
	@rm -rf $(OLDEST)
	@$(PYTHON_OLDEST) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet -r tests/oldest.txt || \
	  { echo "make: installation failed: check the network, the disk, and that $(PYTHON_OLDEST) is a Python 3.10 or 3.11"; exit 1; }
	@$(OLDEST)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-oldest: $(OLDEST)/.installed
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
