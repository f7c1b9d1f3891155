# Every target sets up its environment first: the active conda or virtual environment, otherwise .venv.
# PYTHON=python3.12 picks the interpreter for .venv, LOCK=1 installs the versions of requirements.lock,
# ARGS is passed on: make workbook ARGS="--only 03 -p steps=100"

USABLE := import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for p in python3.12 python3.11 python3; do \
	$$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done),python3)

# conda's base environment is left alone
ACTIVE := $(or $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)),$(VIRTUAL_ENV))
ENV := $(or $(ACTIVE),.venv)
PY := $(ENV)/bin/python
READY := $(ENV)/.ssepa-workbook$(if $(LOCK),-locked)
VERSIONS := $(if $(LOCK),-c requirements.lock)
UV := $(PY) -m uv pip install --python $(PY) --quiet $(VERSIONS)

PORT ?= 8888
FREE := import socket, sys; s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); \
	s.bind(("127.0.0.1", int(sys.argv[1])))
ROOT := $(filter 0,$(shell id -u))

.DEFAULT_GOAL := help
.PHONY: help setup workbook tour lesson lab test soak lint format lock

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## install everything into .venv (or the active environment); LOCK=1 for the tested versions

workbook: $(READY)  ## run all notebooks on the built-in data; results and HTML report under results/
	@$(PY) -m ssepa_lib workbook $(ARGS)

tour: $(READY)  ## run only the first notebook, for a first figure within three minutes
	@$(PY) -m ssepa_lib workbook --only 00 $(ARGS)

lesson: $(READY)  ## write the notebooks for a class, without and with solutions, to results/lesson
	@$(PY) -m ssepa_lib lesson $(ARGS)

lab: $(READY)  ## open the notebooks in JupyterLab, on PORT (8888) of this machine only
	@$(PY) -c '$(FREE)' $(PORT) 2>/dev/null || { \
	echo "Port $(PORT) is busy or not allowed: use another one, for example make lab PORT=8889, or close the JupyterLab that may already run there." >&2; exit 1; }
	@$(if $(ROOT),echo "You are root: JupyterLab is started with --allow-root and can be reached from this machine only.")
	@$(PY) -m jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.port=$(PORT) --ServerApp.port_retries=0 \
	--ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(if $(ROOT),--allow-root) $(ARGS)

test: $(READY)  ## run the tests (VOC_ROOT and SSEPA_WEIGHTS, if set, add those on real images)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

soak: $(READY)  ## kill runs at random moments and compare their ends; the report goes to results/soak
	@OMP_NUM_THREADS=1 $(PY) tests/soak.py $(ARGS)

lint: $(READY)  ## check style, format, types and stripped notebooks without changing a file
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy && $(PY) -m nbstripout --keep-id --verify notebooks/*.ipynb

format: $(READY)  ## format the code, correct what can be corrected, strip notebook outputs
	@$(PY) -m ruff check --fix-only --quiet . && $(PY) -m ruff format . && $(PY) -m nbstripout --keep-id notebooks/*.ipynb

lock: $(READY)  ## write the versions of this environment to requirements.lock, for every platform
	@$(PY) -m uv pip freeze --python $(PY) --exclude-editable --quiet > $(ENV)/installed.txt
	@$(PY) -m uv pip compile pyproject.toml --all-extras --universal --quiet --no-annotate \
	--python-version $$($(PY) -c 'import platform; print(platform.python_version())') \
	--constraint $(ENV)/installed.txt --custom-compile-command "make lock" --output-file requirements.lock
	@echo "requirements.lock: $$(grep -c == requirements.lock) versions"

$(READY): pyproject.toml $(if $(LOCK),requirements.lock)
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
	@$(UV) -e '.[dev]' || $(PY) -m pip install --quiet $(VERSIONS) -e '.[dev]'
	@$(UV) -e '.[crf]' >$(ENV)/crf.log 2>&1 || true
	@$(PY) -c 'import pydensecrf.densecrf' 2>/dev/null || \
	echo "Dense CRF is not available (Python 3.11 or 3.12 and a C++ compiler are needed; see $(ENV)/crf.log); everything else works."
	@touch $(ENV)/.ssepa-workbook $@
