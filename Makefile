.DEFAULT_GOAL := help
.PHONY: help picture test lint demo bench gpu-check browser

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LINTERS := .venv/.linters
BENCH := .venv/.bench
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
CHROMIUM := for name in chromium chromium-browser google-chrome; do command -v $$name && break; done
PICTURE := outputs/picture.png
PYTEST ?= -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 1

help:  ## say what there is to make
	@awk -F ':.*##' '/^[a-z-]+:.*##/ {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making .venv/ and installing into it, once; this takes some minutes"; $(PYTHON) -m venv .venv; }
	@$(INSTALL) --editable '.[test]'
	@touch $@

$(LINTERS): $(INSTALLED)
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(BENCH): $(INSTALLED)
	@$(INSTALL) --editable '.[bench]'
	@touch $@

picture: $(INSTALLED)  ## generate a picture on the embedded model, a negative grafted on
	@$(BIN)/diffgraft generate "a heart , snow" --negative "red" --steps 25 --seed 13 \
	  --out $(PICTURE) >/dev/null
	@echo "the picture is $(CURDIR)/$(PICTURE)"

test: $(INSTALLED) browser  ## run every test (makes .venv/ first; installs chromium when run as root)
	@if test -n "$$($(CHROMIUM))"; then $(BIN)/python -m pytest $(PYTEST); \
	else echo "no chromium: the browser tests are left out; to run them too: sudo apt-get install -y chromium"; \
	  $(BIN)/python -m pytest $(PYTEST) -m "not browser"; fi

browser:
	@if test -z "$$($(CHROMIUM))" && test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
	  echo "installing chromium for the browser tests, once"; export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 || true; fi

lint: $(LINTERS)  ## ruff and pyright (strict on attention/, plugins/, pipelines/)
	@$(BIN)/ruff check .
	@$(BIN)/pyright

demo: $(INSTALLED)  ## open the demo on http://127.0.0.1:7860
	@$(BIN)/diffgraft demo

bench: $(BENCH)  ## print the tables of the documents again, small; FULL=1: in their size, for hours, resumable
	@$(BIN)/python -m diffgraft.app.bench $(if $(FULL),--full)

gpu-check: $(BENCH)  ## time, memory and kernels of grafts on this GPU, real shapes, no weights, eight minutes
	@$(BIN)/python -m diffgraft.app.bench.gpu_check
