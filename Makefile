# Everything here works on a fresh Debian 12 with git, make and python3: lab/setup.py installs the rest, asking first.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-on test-hosts lint bench soak clean-lab

PYTHON ?= python3
RUN := .venv/bin/python
# A container's image may forbid it, and each vmkeep that a test or a benchmark starts would compile all its modules.
export PYTHONDONTWRITEBYTECODE :=
# One more than the two cores: tests wait for VMs, locks and fsync a third of their time. A file's tests stay
# together, so that what a module sets up is set up once.
PYTEST_WORKERS ?= 3
# A hanging test ends with the stacks of its threads, not with the patience of whoever waits for it.
PYTEST_TIMEOUT ?= 120
SECONDS ?= 600
# Where test-on runs: a Debian release, by its code name; with HALF=1 the part of the tests that lab/hosts/half names.
SUITE ?= trixie
HALF ?=
# What to run, and further options: make test ARGS="tests/test_lab.py -k compare"
ARGS ?=

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo "  YES=1 installs missing system packages without asking; CI=true never asks and turns a skipped test red."

setup: ## Install what is missing: system packages (named and asked for first), .venv, this repository's packages
	@$(PYTHON) lab/setup.py

demo: setup ## Back up a running Linux guest three times, restore each backup, compare with the truth
	@$(RUN) -m lab.demo $(ARGS)

test: setup ## Run all tests, with real VMs
	@$(RUN) -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder --timeout $(PYTEST_TIMEOUT) -m "not soak" --durations 60 --durations-min 3 $(ARGS)

test-on: ## Run the tests on another Debian release, in a root of its own, as root (SUITE=trixie, HALF=1, ARGS)
	@$(PYTHON) lab/setup.py hosts
	@$(RUN) -m lab.hosts.suite $(SUITE) $(if $(HALF),--half) .venv/bin/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder --timeout $(PYTEST_TIMEOUT) -m "not soak" --durations 60 --durations-min 3 $(ARGS)

test-hosts: ## Run chosen tests on a Debian 12 and a Debian 13 host, each with its own kernel and AppArmor (needs root)
	@$(PYTHON) lab/setup.py hosts
	@$(RUN) -m lab.hosts $(ARGS)

lint: setup ## ruff (lint and format) and mypy --strict
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy

bench: ## Run our work beside what a user would run instead, on the same live VM (ARGS="--rounds 5 full-restic")
	@$(PYTHON) lab/setup.py bench
	@$(RUN) -m benchmarks $(ARGS)

soak: setup ## Run the tests that take long, and all tests on the other Debian release; SECONDS=3600 is how long the random life goes on
	@SECONDS=$(SECONDS) $(RUN) -m pytest --timeout $$(($(SECONDS) + 3600)) -m soak $(ARGS)
	@$(MAKE) --no-print-directory test-on ARGS=
	@$(RUN) -m lab.hosts --soak

clean-lab: ## Remove all that the lab made: its VMs and their files, the guest's kernel, .lab and .venv
	@$(PYTHON) lab/clean.py
