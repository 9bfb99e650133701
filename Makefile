# The commands of the project; `make help` lists them. Everything runs in $(VENV), which is made on first use.
#
#   PYTHON       interpreter that makes the environment (3.10 or newer; Snakemake needs 3.11)
#   VENV         where the environment lives
#   CONSTRAINTS  file of pinned versions; empty for the ranges of pyproject.toml, as when your own torch is in $(VENV)
#
# Values are taken as they are: make DATA="it's my data" works, and so does a $ in a name. Only ARGS is text for the
# shell, which splits it into words and heeds its quotes.

PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= requirements/constraints.txt
JOBS        ?= 2
FLAGS       ?=
DATA        ?=
WEIGHTS     ?=
PROFILE     ?= $(if $(DATA),real,demo)
SET         ?=
DRY         ?=
DEVICE      ?= cuda
ARGS        ?=

# The shell reads these from its environment, where quotes, blanks, $ and line breaks are letters like any other.
LITERAL := PYTHON DATA WEIGHTS PROFILE SET DRY FLAGS JOBS DEVICE
GIVEN    = $(filter command environment,$(origin $(1)))
$(foreach name,$(LITERAL),$(if $(call GIVEN,$(name)),$(eval override $(name) := $$(value $(name)))))
export $(LITERAL)

# These two name files of make itself, which knows no quotes.
QUOTE := '
ODD    = $(strip $(word 2,$(value $(1))) $(foreach sign,$(QUOTE) " $$ ; : %,$(findstring $(sign),$(value $(1)))))
$(foreach name,VENV CONSTRAINTS,$(if $(call GIVEN,$(name)),$(if $(call ODD,$(name)),$(error \
  $(name): names with blanks, quotes or one of $$ ; : % do not work here; choose another))))

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install reproduce reproduce-full test docs browser app bench gpu-check lint export clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

install: $(STAMP)  ## make the environment and install the package with all tools

$(STAMP): pyproject.toml $(wildcard $(CONSTRAINTS))
	@command -v "$$PYTHON" >/dev/null || { \
	  echo "error: '$$PYTHON' was not found; name a Python 3.10 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "error: $$("$$PYTHON" --version 2>&1) is too old; name a Python 3.10 or newer: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || "$$PYTHON" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $$PYTHON cannot make a virtual environment; on Debian and Ubuntu install python3-venv"; exit 1; }
	@echo "installing into $(VENV); the first time this takes a few minutes"
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev]'
	@touch $@

reproduce: $(STAMP)  ## every table and figure (DATA=DIR: of real images; WEIGHTS=NAME: with these; PROFILE=demo|real|full SET="STAGE.NAME=VALUE ..." DRY=1)
	@set -f; for change in $$SET; do set -- "$$@" "--set=$$change"; done; \
	$(BIN)/python nbs/experiments/reproduce.py "--profile=$$PROFILE" $${DATA:+"--data=$$DATA"} $${WEIGHTS:+"--weights=$$WEIGHTS"} "$$@" \
	  $${DRY:+--dry-run} $(if $(ARGS),-- $(ARGS))

reproduce-full:  ## the same with all training, ablations and seeds: demo scale, with DATA=DIR as in the paper (GPU)
	@$(MAKE) --no-print-directory reproduce PROFILE=full

test: $(STAMP)  ## test the notebooks and tests/ (JOBS=2, FLAGS="slow cuda" for flagged cells, ARGS for pytest)
	@rm -f .last-test-count; status=0; \
	$(BIN)/python -m pytest -n "$$JOBS" --notebook-flags "$$FLAGS" $(ARGS) || status=$$?; \
	cat .last-test-count 2>/dev/null || echo "0 passed, 1 failed"; exit $$status

docs: reproduce  ## the site, into _docs/site: all notebooks, with the experiments as this machine's last demo run left them
	@$(BIN)/python docs/build.py _docs/site && echo "open _docs/site/index.html"

browser:  ## install Chromium, which the browser tests need (Debian, Ubuntu; or set SMFNET_CHROMIUM=/path/to/chrome)
	@if [ -n "$$SMFNET_CHROMIUM" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; then echo "Chromium is here"; \
	elif ! command -v apt-get >/dev/null; then echo "error: no apt-get; install Chromium and set SMFNET_CHROMIUM to its path"; exit 1; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	else sudo apt-get update -qq && sudo apt-get install -y -qq chromium >/dev/null; fi

app: $(STAMP)  ## serve nbs/apps as pages on this machine, for who has the token (ARGS="--port=8866 --no-browser")
	@$(BIN)/python nbs/apps/serve.py $(ARGS)

bench: $(STAMP)  ## time fusion over sizes, and a training step, against a literal version (ARGS="--slow" for all sizes)
	@$(BIN)/python -m bench.inference $(ARGS)

gpu-check: $(STAMP)  ## what to check first on a graphics card; writes results/gpu/, goes on where it stopped (DEVICE=cpu: a tiny trial)
	@$(BIN)/python -m bench.gpu "--device=$$DEVICE" $(ARGS)

lint: $(STAMP)  ## check the style of notebooks, modules and tests
	@$(BIN)/ruff check .

export: $(STAMP)  ## write smfnet/*.py and README.md from the notebooks, and clean these
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean
	@$(BIN)/jupyter nbconvert --log-level ERROR --to markdown --stdout nbs/index.ipynb | sed 's#](../#](#g' > README.md

clean:  ## remove what the commands made (the environment stays)
	rm -rf runs/demo figures/demo .pytest_cache .ruff_cache .hypothesis .last-test-count build dist _docs _proc
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
