# The one door for people and for CI. `make` lists what there is.
PYTHON ?= python3
# The rest is set on the command line only (`make run DATA=photos/`): shells keep HOST and GROUPS for themselves.
DATA =
GROUPS =
WEIGHTS =
OUT =
SEED =
QUICK =
MODEL = runs/samples/bundle
HOST = 127.0.0.1
PORT = 8000

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install dev run test check lab serve docs quarto readme clean
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
FROM := settings.ini setup.py pyproject.toml
# Large downloads are shown, the hundred small ones are not
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
SHOW := { grep --line-buffered -E '^ *Downloading .*\(([0-9]{2,}[0-9.]* MB|[0-9.]+ GB)\)' || true; }

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.install ## Make .venv with all that runs, trains and serves (PYTHON=python3.12 chooses the Python)

dev: .venv/.dev ## The same, and what tests and documents it

.venv/bin/pip:
	@command -v '$(PYTHON)' >/dev/null || { echo "There is no $(PYTHON) here. Say which Python to use: make install PYTHON=/path/to/python3"; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; $(PYTHON) is $$('$(PYTHON)' --version 2>&1). Say which one to use: make install PYTHON=python3.12"; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Making .venv with $$('$(PYTHON)' --version 2>&1)"
	@'$(PYTHON)' -m venv --clear .venv

.venv/.install: $(FROM) | .venv/bin/pip
	@echo "Installing amulet_hybrid and what it needs into .venv. PyTorch is large: this takes some minutes."
	@$(PIP) -e '.[all]' | $(SHOW)
	@touch $@

.venv/.dev: $(FROM) | .venv/bin/pip
	@echo "Installing amulet_hybrid with its test and documentation tools into .venv. PyTorch is large: this takes some minutes."
	@$(PIP) -e '.[all,dev]' | $(SHOW)
	@touch .venv/.install $@

run: install ## Train and report, on generated samples or on DATA=photos/ [GROUPS=groups.csv WEIGHTS=dir OUT=dir SEED=1 QUICK=1]
ifeq ($(strip $(DATA)),)
	@test -e samples/groups.csv || $(BIN)/amulet samples --output-dir samples
	@$(BIN)/amulet run --data-dir samples --groups samples/groups.csv --output-dir '$(or $(OUT),runs/samples)' $(OPTIONS)
else
	@test -d '$(DATA)' || { echo "DATA=$(DATA) is not a folder"; exit 1; }
	@out='$(OUT)'; $(BIN)/amulet run --data-dir '$(DATA)' $(if $(GROUPS),--groups '$(GROUPS)') \
	  --output-dir "$${out:-runs/$$(basename "$$(cd '$(DATA)' && pwd)")}" $(OPTIONS)
endif
OPTIONS = $(if $(WEIGHTS),--weights '$(WEIGHTS)') $(if $(SEED),--seed '$(SEED)') $(if $(filter-out 0,$(QUICK)),--quick)

check: dev ## Notebooks and modules agree and are clean; ruff; mypy
	@echo "== notebooks and modules agree"
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	cp -R settings.ini pyproject.toml _quarto.yml nbs amulet_hybrid "$$tmp"; \
	find "$$tmp/amulet_hybrid" -name '*.py' ! -path "$$tmp/amulet_hybrid/__init__.py" ! -path "$$tmp/amulet_hybrid/store/migrations/*" -delete; \
	bin="$$PWD/$(BIN)"; (cd "$$tmp"; "$$bin/nbdev_export"); \
	diff -r -x __pycache__ -x runs amulet_hybrid "$$tmp/amulet_hybrid" || \
	  { echo "The modules (<) are not what the notebooks export (>). Change the notebooks, never the modules; then: $(BIN)/nbdev_export"; exit 1; }; \
	(cd "$$tmp"; "$$bin/nbdev_clean"); \
	diff -rq -x .ipynb_checkpoints -x __pycache__ nbs "$$tmp/nbs" || { echo "These notebooks are not clean. Then: $(BIN)/nbdev_clean"; exit 1; }
	@echo "== ruff"
	@$(BIN)/ruff check --quiet --output-format concise amulet_hybrid nbs $(wildcard tests benchmarks)
	@echo "== mypy"
	@$(BIN)/mypy --no-error-summary amulet_hybrid

test: check ## Everything that CI checks: the above, every notebook executed, and the tests
	@echo "== notebooks, executed"
	@find nbs -name '[!_]*.ipynb' -not -path '*/.*' | sort | AMULET_PROGRESS=off xargs -P 2 -I '{}' $(BIN)/nbdev_test --path '{}' --flags slow --n_workers 0 --timing
	@echo "== tests"
	@AMULET_PROGRESS=off $(BIN)/python -m pytest -n 2 --dist loadfile tests

lab: install ## Explore the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

serve: install ## Answer over HTTP with MODEL=runs/samples/bundle at HOST=127.0.0.1 PORT=8000
	@$(BIN)/amulet serve --model-dir '$(MODEL)' --host '$(HOST)' --port '$(PORT)'

docs: quarto dev ## Render the documentation site into _docs (needs Quarto on the PATH)
	@rm -rf _proc _docs
	@$(BIN)/nbdev_proc_nbs --file_re '\.(ipynb|qmd)$$'
	@cd _proc && quarto render --no-cache
	@mv _proc/_docs _docs
	@echo "The site is in _docs/index.html"

quarto:
	@command -v quarto >/dev/null || { echo "Quarto, which renders the site, is not on the PATH."; echo "Get it from https://quarto.org/docs/get-started and run make docs again."; exit 1; }

readme: dev ## Make README.md from nbs/index.ipynb
	@$(BIN)/jupyter nbconvert --to markdown --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=remove-cell --TagRemovePreprocessor.remove_input_tags=remove-input --output-dir . --output README --log-level ERROR nbs/index.ipynb

clean: ## Remove what was made here, except .venv, samples and runs
	@rm -rf _proc _docs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache nbs/.ipynb_checkpoints
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
