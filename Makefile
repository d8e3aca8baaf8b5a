# make quickstart   set up, fine-tune the small MoE that ships with the repository, show what changed
# make test         set up, run the tests
# make check        lint and types
#
# VENV=             uses $(PYTHON) as it is, with whatever is installed there, instead of making a virtual environment.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

ifeq ($(strip $(VENV)),)
PY := PYTHONPATH=$(CURDIR)/src:$$PYTHONPATH $(PYTHON)
READY :=
READY_DEV :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
endif
# Without --no-compile pip compiles every file of torch and Transformers, a minute; imports compile what they need.
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: quickstart test check setup clean

# One process uses one GPU; of several, the first is enough for this model.
quickstart: $(READY)
	@test ! -e runs/quickstart || mv runs/quickstart runs/quickstart-before-$$(date +%Y%m%d-%H%M%S)
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(PY) -m expertune train examples/quickstart.yaml

# Tests start some hundred processes: one that may not keep what it compiled of Transformers takes 13 seconds, not 5.
# With an NVIDIA GPU: the CPU's as on a machine without one, then the GPU's; PYTEST_ARGS="-m gpu" runs these alone. (5: no
# test was selected.)
test: export PYTHONDONTWRITEBYTECODE :=
test: $(READY_DEV)
	@if nvidia-smi -L >/dev/null 2>&1 && ! echo " $(PYTEST_ARGS)" | grep -q -- " -m"; then \
		set -ex; \
		CUDA_VISIBLE_DEVICES= $(PY) -m pytest -m "not gpu" $(PYTEST_ARGS) || test $$? = 5; \
		$(PY) -m pytest -m gpu $(PYTEST_ARGS) || test $$? = 5; \
	else \
		set -x; $(PY) -m pytest $(PYTEST_ARGS); \
	fi

check: $(READY_DEV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

setup: $(READY_DEV)

# Redone only when the dependencies change. Without an NVIDIA GPU torch comes first and by version: a plain torch, also
# as another package's dependency, may bring gigabytes of CUDA libraries.
$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expertune needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.12"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "python's venv module is missing (on Debian: apt-get install python3-venv)"; rm -rf $(VENV); exit 1; }
	@if nvidia-smi -L >/dev/null 2>&1; then torch="torch>=2.11,<3"; else torch="torch==2.13.0"; fi; \
		echo "installing $$torch, then expertune and its dependencies into $(VENV) (once, a few minutes)"; \
		$(PIP) "$$torch" && $(PIP) -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	@echo "installing what tests and checks need"
	@$(PIP) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
