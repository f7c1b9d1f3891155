# Every target sets up its environment first: the active conda or virtual environment, otherwise .venv.
# PYTHON=python3.12 picks the interpreter for .venv, ARGS is passed on: make workbook ARGS="--only 03 -p steps=100"

USABLE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for p in python3.12 python3.11 python3; do \
	$$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done),python3)

# conda's base environment is left alone
ACTIVE := $(or $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)),$(VIRTUAL_ENV))
ENV := $(or $(ACTIVE),.venv)
PY := $(ENV)/bin/python
READY := $(ENV)/.ssepa-workbook
UV := $(PY) -m uv pip install --python $(PY) --quiet

.DEFAULT_GOAL := help
.PHONY: help setup workbook test lab lint

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## install everything into .venv (or the active environment)

workbook: $(READY)  ## run all notebooks on the built-in data; results and HTML report under results/
	@$(PY) -m ssepa_lib workbook $(ARGS)

test: $(READY)  ## run the tests (VOC_ROOT and SSEPA_WEIGHTS, if set, add those on real images)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(PY) -m jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(ARGS)

lint: $(READY)  ## check style and strip notebook outputs
	@$(PY) -m ruff check . && $(PY) -m nbstripout notebooks/*.ipynb

$(READY): pyproject.toml
ifeq ($(ACTIVE),)
	@$(PYTHON) -c '$(USABLE)' 2>/dev/null || { \
	echo "$(PYTHON) is missing, older than 3.11 or without its venv module: install Python 3.11 or 3.12, or pass PYTHON=/path/to/python3.12." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "Creating .venv with $(PYTHON) …"; $(PYTHON) -m venv --clear .venv; }
else
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "The active environment $(ACTIVE) has a Python older than 3.11: deactivate it, or activate one with 3.11 or 3.12." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade >/dev/null
endif
	@echo "Installing into $(ENV) (about 5 GB on Linux, torch brings its CUDA libraries; once) …"
	@$(PY) -m pip install --quiet --disable-pip-version-check uv || true
	@$(UV) -e '.[dev]' || $(PY) -m pip install --quiet -e '.[dev]'
	@$(UV) -e '.[crf]' >$(ENV)/crf.log 2>&1 || true
	@$(PY) -c 'import pydensecrf.densecrf' 2>/dev/null || \
	echo "Dense CRF is not available (Python 3.11 or 3.12 and a C++ compiler are needed; see $(ENV)/crf.log); everything else works."
	@touch $@
