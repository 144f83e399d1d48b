# The one door for people and for CI. `make` lists what there is.
PYTHON ?= python3
# The rest is set on the command line only (`make run DATA=photos/`): shells keep HOST and GROUPS for themselves.
DATA =
GROUPS =
WEIGHTS =
OUT =
SEED =
QUICK =
ARGS =
# Coverage of tests and notebooks together; off by default, for it slows Python 3.11 by a third
COVERAGE =
MODEL = runs/samples/bundle
HOST = 127.0.0.1
PORT = 8000

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install dev run test check each agree lint types docs-check tests notebooks lock lab serve docs quarto readme clean
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
FROM := settings.ini setup.py pyproject.toml constraints.txt
# Versions that were tested together; NEWEST=1 takes the newest there are
NEWEST =
MEASURED = $(filter-out 0,$(COVERAGE))
LOCKED = $(if $(filter-out 0,$(NEWEST)),,-c constraints.txt)
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
	@$(PIP) $(LOCKED) -e '.[all]' | $(SHOW)
	@touch $@

.venv/.dev: $(FROM) | .venv/bin/pip
	@echo "Installing amulet_hybrid with its test and documentation tools into .venv. PyTorch is large: this takes some minutes."
	@$(PIP) $(LOCKED) -e '.[all,dev]' | $(SHOW)
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

check: dev ## Notebooks and modules agree and are clean; ruff; mypy; the documentation can be built
	@$(MAKE) each STAGES='agree lint types docs-check'

test: dev ## Everything that CI checks: the above, every notebook, every test [COVERAGE=1 NEWEST=1]
	@$(MAKE) each STAGES=tests BESIDE='agree lint types'

# Every stage runs, whatever became of those before it, and those of BESIDE meanwhile, for tests often wait for
# processes; what failed is said at the end
each:
	@failed=''; said=$$(mktemp); { [ -z '$(BESIDE)' ] || $(MAKE) -k $(BESIDE); } >"$$said" 2>&1 & beside=$$!; \
	for stage in $(STAGES); do echo "== $$stage"; $(MAKE) $$stage || failed="$$failed $$stage"; done; \
	[ -z '$(BESIDE)' ] || echo '== $(BESIDE)'; wait $$beside || failed="$$failed $(BESIDE)"; cat "$$said"; rm -f "$$said"; \
	[ -z "$$failed" ] || { echo "Failed:$$failed"; exit 1; }

agree:
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	cp -R settings.ini pyproject.toml _quarto.yml nbs amulet_hybrid "$$tmp"; \
	find "$$tmp/amulet_hybrid" -name '*.py' ! -path "$$tmp/amulet_hybrid/__init__.py" ! -path "$$tmp/amulet_hybrid/store/migrations/*" -delete; \
	bin="$$PWD/$(BIN)"; (cd "$$tmp"; "$$bin/nbdev_export"); \
	diff -r -x __pycache__ -x runs amulet_hybrid "$$tmp/amulet_hybrid" || \
	  { echo "The modules (<) are not what the notebooks export (>). Change the notebooks, never the modules; then: $(BIN)/nbdev_export"; exit 1; }; \
	(cd "$$tmp"; "$$bin/nbdev_clean"); \
	diff -rq -x .ipynb_checkpoints -x __pycache__ nbs "$$tmp/nbs" || { echo "These notebooks are not clean. Then: $(BIN)/nbdev_clean"; exit 1; }

lint:
	@$(BIN)/ruff check --quiet --output-format concise amulet_hybrid nbs docs $(wildcard tests benchmarks)

types:
	@$(BIN)/mypy --no-error-summary amulet_hybrid

docs-check:
	@$(BIN)/python -m pytest -q tests/test_docs.py

# More workers than two cores: a test often waits for a server, a process or a disk. Each has one thread
WORKERS ?= 3

tests:
	@rm -f .coverage .coverage.*
	@OMP_NUM_THREADS=1 AMULET_PROGRESS=off MEASURE_NOTEBOOKS=$(MEASURED) $(BIN)/python -m pytest -n $(WORKERS) tests
	@[ -z '$(MEASURED)' ] || { $(BIN)/coverage combine -q && $(BIN)/coverage report --fail-under=90; }

notebooks: dev ## Every notebook, executed, without the other tests
	@OMP_NUM_THREADS=1 AMULET_PROGRESS=off $(BIN)/python -m pytest -n $(WORKERS) tests/test_notebooks.py

lock: .venv/bin/pip ## Write constraints.txt anew: the newest versions that go together, for Python 3.11 to 3.13
	@$(PIP) 'uv>=0.9' | $(SHOW)
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest --strip-extras --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links --extra all --extra dev setup.py -o constraints.txt

lab: install ## Explore the notebooks in JupyterLab [ARGS=--allow-root, or whatever else jupyter lab takes]
	@$(BIN)/jupyter lab nbs $(ARGS)

serve: install ## Answer over HTTP with MODEL=runs/samples/bundle at HOST=127.0.0.1 PORT=8000
	@$(BIN)/amulet serve --model-dir '$(MODEL)' --host '$(HOST)' --port '$(PORT)'

docs: quarto dev ## Render the documentation site into _docs (needs Quarto on the PATH)
	@rm -rf _proc _docs
	@$(BIN)/python docs/pages.py sidebar nbs
	@PYTHONPATH=docs $(BIN)/nbdev_proc_nbs --file_re '\.(ipynb|qmd)$$'
	@cp CONTRIBUTING.md CHANGELOG.md docs/site.css docs/site.scss _proc
	@PYTHONPATH=docs $(BIN)/python docs/pages.py reference _proc
	@cd _proc && quarto render --no-cache
	@mv _proc/_docs _docs
	@$(BIN)/python docs/pages.py tidy _docs
	@echo "The site is in _docs/index.html"

quarto:
	@command -v quarto >/dev/null || { echo "Quarto, which renders the site, is not on the PATH."; echo "Get it from https://quarto.org/docs/get-started and run make docs again."; exit 1; }

readme: dev ## Make README.md from nbs/index.ipynb, and the table of modules in CONTRIBUTING.md
	@$(BIN)/python docs/pages.py readme .
	@$(BIN)/python docs/pages.py modules .

clean: ## Remove what was made here, except .venv, samples and runs
	@rm -rf _proc _docs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* nbs/.ipynb_checkpoints
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
