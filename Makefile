# Set-up, run and checks. `make help` lists the targets; every target does its own set-up.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ROOMS  := contracts gateway workers governance resilience deploy
# Of `make chaos`: minutes under faults, seed of load and faults, mean events per second.
MINUTES ?= 30
SEED    ?= 1
RATE    ?= 60
# Twice quiet: errors only, no warnings.
PIP    := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
export PIP_ROOT_USER_ACTION := ignore
# Machines cannot answer questions; people on a terminal are asked before anything is installed.
ifeq ($(CI),true)
export YES := 1
endif

.DEFAULT_GOAL := help
.PHONY: help venv run check test lint unit simulate chaos mutants bench-rivals documents lock clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## The virtual environment in .venv, from the hashed lock
	@echo "$(VENV) is up to date"

# The stamp is newer than lock and project file only when the installation went through.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "riskfleet needs Python 3.11 or newer; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || sh deploy/install_venv.sh "$(PYTHON)"
	@echo "installing into $(VENV) (a minute, only when the lock changes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

run: $(STAMP) ## The whole fleet on this machine with demo events (ONESHOT=1 stops after them)
	@ONESHOT="$(ONESHOT)" $(BIN)/riskfleet up --demo

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(ROOMS) tests
	@$(BIN)/lint-imports

unit: $(STAMP)
	@$(BIN)/python -m pytest tests/unit tests/architecture

check: lint unit ## Linters, types, import rules, unit and architecture tests (no server needed)

test: lint ## Everything, with real servers (installed by apt after a yes, or with YES=1)
	@$(BIN)/python -m deploy.servers
	@$(BIN)/python -m pytest tests

bench-rivals: $(STAMP) ## Every rival and riskfleet in turn; writes docs/performance.md (QUICK=1 tries it)
	@$(BIN)/python -m tests.load.rivals.run $(if $(QUICK),--quick --out .rivals)

simulate: $(STAMP) ## All failpoints, all pairs of them and 100,000 seeds in virtual time (ARGS="--only seeds --to 1000")
	@$(BIN)/python -m tests.simulation.campaign $(ARGS)

mutants: $(STAMP) ## Planted bugs, each of which the simulation or a named test must catch
	@$(BIN)/python -m tests.simulation.mutants $(ARGS)

documents: $(STAMP) ## Write the generated documents again (docs/*.json, docs/problems.md, docs/schema.sql, .env.example)
	@$(BIN)/python -m deploy.documents
	@$(BIN)/riskfleet config example > .env.example.new && mv .env.example.new .env.example
	@$(BIN)/python -m deploy.migrations.dump > docs/schema.sql.new && mv docs/schema.sql.new docs/schema.sql

chaos: $(STAMP) ## 30 minutes of kills, pauses, resets and restarts under load; writes docs/evidence/chaos.json
	@$(BIN)/python -m deploy.servers
	@$(BIN)/python -W ignore -m tests.faults.chaos --minutes $(MINUTES) --seed $(SEED) --rate $(RATE) \
	  --evidence docs/evidence/chaos.json

lock: $(STAMP) ## Resolve the dependencies again and write requirements.lock
	@$(PIP) install "pip-tools>=7.6,<8"
	@$(BIN)/pip-compile --quiet --upgrade --generate-hashes --extra demo --extra dev --strip-extras --allow-unsafe --no-header \
	  --no-annotate --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	  --output-file requirements.lock pyproject.toml
	@sed -i "/^#/d" requirements.lock

clean: ## Remove what was built and cached; data in .riskfleet stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find $(ROOMS) tests -name __pycache__ -prune -exec rm -rf {} +
