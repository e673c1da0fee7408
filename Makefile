# The front door. `make` alone prints this help: each target's text stands behind its ##.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed
NAME ?=
PORT ?= 7860
CORS ?=
MODEL ?= tuned
SPACE ?=
DATA ?=
DRY ?=
# Tests in two processes; those that share an expensive fixture stay together (GROUPS in tests/conftest.py).
PARALLEL := --numprocesses 2 --dist loadgroup

# Stages are run as plain `python`, also in folders of queued experiments: the environment comes first on PATH.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# DVC keeps experiments as git commits, and refuses where git knows no user: an activated environment names one.
define LEND_IDENTITY

if ! git config user.email >/dev/null 2>&1; then
    export GIT_AUTHOR_NAME="$${USER:-nobody}" GIT_AUTHOR_EMAIL="$${USER:-nobody}@localhost"
    export GIT_COMMITTER_NAME="$$GIT_AUTHOR_NAME" GIT_COMMITTER_EMAIL="$$GIT_AUTHOR_EMAIL"
fi
endef
export LEND_IDENTITY

.DEFAULT_GOAL := help
.PHONY: help all serve chat space deploy test test-long test-fast lint docs check plan recipe verify status clean lock setup

help:  ## Print this help.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

all: setup  ## Set up, run every stage whose inputs changed, and print a summary.
	@$(PY) -m commands repro
	@$(PY) -m commands summary

serve: setup  ## Serve the chat page and an OpenAI-style API on loopback: make serve PORT=7860
	@exec $(PY) -m commands serve --port $(PORT) $(if $(CORS),--cors "$(CORS)")

chat: setup  ## Chat with an exported model in the terminal: make chat MODEL=base
	@exec $(PY) space/chat.py --model models/onnx/$(MODEL)

space: setup  ## Build the chat app as a Hugging Face Space, in build/space/.
	@$(PY) -m commands space

deploy: setup  ## Publish model and Space (DRY=1 only lists): make deploy SPACE=user/name
	@$(PY) -m commands deploy "$(SPACE)" $(if $(DRY),--dry)

test: setup  ## Set up and run all tests.
	@$(PY) -m pytest $(PARALLEL)

test-long: setup  ## Set up and run the longest tests: kills, full disks, runs from nothing (an hour).
	@$(PY) -m pytest -m long

test-fast: setup  ## Set up and run the tests that take no more than a minute together.
	@$(PY) -m pytest -m "not slow" $(PARALLEL)

lint: setup  ## Check style (ruff) and types (mypy).
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

docs: setup  ## Write docs/parameters.md and the comments of params.yaml and recipes/ from the parameters' descriptions.
	@$(PY) -m commands docs

check: setup  ## Show what training would make of a data file or folder: make check DATA=data/local/mine.jsonl
	@$(PY) -m commands check "$(DATA)"

plan: setup  ## Report what a run needs (memory, disk, time) and whether this machine has it, before any download.
	@$(PY) -m commands plan

recipe: setup  ## Put recipes/NAME.yaml in place of params.yaml: make recipe NAME=phi2-oasst1
	@$(PY) -m commands recipe $(NAME)

verify: setup  ## Run the pipeline twice from nothing, elsewhere, and compare every output with each other and with git.
	@$(PY) -m commands verify

status: setup  ## List the stages that would run, and print the last summary.
	@$(PY) -m commands status

clean:  ## Remove caches and half-made outputs, and nothing that took work to make.
	@find . -path ./$(VENV) -prune -o -path ./.dvc -prune -o -path ./.git -prune -o \
		\( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache -o -name .mypy_cache -o -name .hypothesis \
		-o -name '.*.partial' \) -print0 | xargs -0 rm -rf
	@rm -rf build dvc_plots

lock: requirements.txt  ## Make requirements.lock again from requirements.txt, at today's versions.
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; $(PYTHON) -m venv "$$folder"; \
		"$$folder/bin/python" -m pip install -qq --requirement requirements.txt; \
		{ echo "# Made by \`make lock\`. What torch itself needs (its CUDA packages, where it is a CUDA build) is left to it."; \
		"$$folder/bin/python" -m pip freeze --quiet | sed -E 's/[+]cpu$$//' | grep -vE '^(nvidia|cuda|triton)'; } > .lock.partial; \
		mv .lock.partial requirements.lock
	@echo "requirements.lock: $$(grep -c == requirements.lock) packages"

# Two calls at once would install into one folder: the second waits, and then has nothing to do.
setup:
	@$(MAKE) --question --silent $(INSTALLED) || \
		$(PYTHON) -m stages.common.locks $(MAKE) --no-print-directory --silent $(INSTALLED)

# Only when the lock is newer than the last finished installation.
$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		f"error: Python {sys.version.split()[0]} is too old, 3.11 or newer is needed: make PYTHON=python3.11 …")'
	@echo "Installing $$(grep -c == requirements.lock) pinned packages into $(VENV) (once, a few minutes)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install -qq --no-compile --requirement requirements.lock
	@echo "$$LEND_IDENTITY" >> $(VENV)/bin/activate
	@touch $(INSTALLED)
