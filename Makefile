# Everything from a clean clone with Python 3.11 or newer and make. `make` alone lists the targets.

PYTHON ?= python3
# One worker a file: fixtures that train models or start servers are made once.
PYTEST_ARGS ?= -n 2 --dist loadfile
bin := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean
.DELETE_ON_ERROR:

help: ## This list
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /: /'

demo: .venv/.program ## The whole ensemble on generated bars, without network or keys
	@$(bin)/quartet demo

test: .venv/.tests ## The whole test suite
	@$(bin)/python -m pytest $(PYTEST_ARGS)

check: .venv/.tests ## Lint, format, types and the direction of imports
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@$(bin)/lint-imports

bench: .venv/.tests ## Measure again every number that README quotes
	@$(bin)/python -m benchmarks

clean: ## Remove what was installed, built and cached, but neither models nor .quartet
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv .venv

# Stamps, so that a second run installs nothing. The tests' stamp covers the program's.
.venv/.program: pyproject.toml constraints.txt | .venv/bin/python
	$(bin)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/.tests: pyproject.toml constraints.txt | .venv/bin/python
	$(bin)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	@touch .venv/.program $@
