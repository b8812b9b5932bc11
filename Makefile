# `make` alone lists the targets.
# Looked up before .venv/bin comes first on PATH.
PYTHON := $(or $(PYTHON),$(shell command -v python3),python3)
VENV := $(CURDIR)/.venv
# Where no MPI is installed the set-up puts one into the environment.
export PATH := $(VENV)/bin:$(PATH)
ARGS ?=
# How much longer `make fuzz` is than the fuzz tests of `make test`.
TIMES ?= 20
# Test processes side by side.
JOBS ?= 2
WHICH := -m "not long"
PYTEST := $(VENV)/bin/python -m pytest
# ARGS may select none of a part's tests, which is 5 to pytest.
NONE := $(if $(ARGS),|| [ $$$$? = 5 ])
SOURCES := harness launch tests benchmarks docs setup.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-fast faults fuzz audit sbom docs lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "The first target that needs it sets .venv up: about 5 minutes, of which 2 compile"
	@echo "Horovod; the wheel is kept outside the checkout. After that the set-up takes a second."

setup: ## .venv with everything in it
	@$(PYTHON) -m launch.bootstrap

demo: setup ## a short adaptive-batch run on 2 ranks, with its report
	@$(VENV)/bin/harness run configs/adabatch-digits.yaml --ranks 2 $(ARGS)

# Those that start ranks need the cores for themselves.
test: setup ## all tests but the longest; ARGS="-k name" for some
	@$(PYTEST) tests/parallel tests/slurm $(WHICH) $(ARGS) $(NONE)
	@OMP_NUM_THREADS=1 $(PYTEST) --ignore tests/parallel --ignore tests/slurm -n $(JOBS) $(WHICH) $(ARGS) $(NONE)

test-all: setup ## the longest too
	@$(MAKE) --no-print-directory test WHICH=

test-fast: setup ## the tests that take a few seconds at most
	@OMP_NUM_THREADS=1 $(PYTEST) -m "not slow" -n $(JOBS) $(ARGS)

faults: setup ## the fault matrix (docs/reliability.md); ARGS="--quick" for some rows
	@PYTHONPATH=tests $(VENV)/bin/python -m faults matrix $(ARGS)

fuzz: setup ## the fuzz tests, TIMES=20 as long and with new examples each time
	@HARNESS_FUZZ=$(TIMES) OMP_NUM_THREADS=1 $(PYTEST) --timeout 36000 -n $(JOBS) $(ARGS) \
		tests/test_fuzz_*.py

audit: setup ## known vulnerabilities of what is installed; asks PyPI's and OSV's databases
	$(VENV)/bin/python -m venv .audit
	.audit/bin/python -m pip install --quiet pip-audit
	.audit/bin/pip-audit --path $(wildcard $(VENV)/lib/python3*/site-packages) $(ARGS)

sbom: setup ## docs/sbom.cdx.json, the bill of materials of what is installed
	$(VENV)/bin/python -m launch.bootstrap.sbom > docs/sbom.cdx.json

docs: setup ## the site, in build/site; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy

clean: ## remove .venv and what tools left; the cached wheel and runs/ stay
	rm -rf .venv .audit build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
