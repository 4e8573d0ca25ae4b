# make run: everything, from a fresh clone to the table. make test: ruff, types, tests. make help: all of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEAM_STAMP := $(VENV)/.installed-team
UV := uv==0.13.9
# Some minutes quicker than pip, which unpacks and compiles 6 GB with one thread; pip where uv can't reach the packages,
# as when only pip's configuration knows the index.
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python -r $< || $(BIN)/python -m pip install --quiet -r $<
# What uv installs is compiled when it is first imported, and must be kept: every stage is a process of its own.
unexport PYTHONDONTWRITEBYTECODE
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK = true

.PHONY: help run test acceptance ui flow install clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name one: make PYTHON=python3.12 run")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(INSTALL)
	@touch $@

install: $(STAMP) ## .venv with the pinned packages

run: $(STAMP) ## data, pretraining, evaluation, report; then the table of scores
	@python -m pipelines.processes.ending dvc repro
	@python -m pipelines.table

test: $(STAMP) ## ruff, types, tests, and the whole pipeline on a tiny data set
	ruff check .
	ruff format --check .
	mypy -n 2
	OMP_NUM_THREADS=1 pytest -n 2 --dist loadscope --no-loadscope-reorder

$(TEAM_STAMP): requirements-team.txt $(STAMP)
	$(INSTALL)
	@touch $@

acceptance: $(TEAM_STAMP) ## the long checks: kills, services, browsers, a group's set-up, an evening
	pytest -m acceptance

ui: $(STAMP) ## MLflow's page of the runs, on 127.0.0.1 (elsewhere: HOST=..., read SECURITY.md first)
	@python -m pipelines.ui $(if $(HOST),--host $(HOST))

flow: $(STAMP) ## the same pipeline as a Prefect flow
	@python -m pipelines.flow

clean: ## remove what tests and builds leave (no data, no results)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis dvc_plots
