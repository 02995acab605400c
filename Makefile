.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# each worker has files that stand together, so that what a file prepares once is prepared by one of them; who is done
# first takes some of the other's
FAST := -q -n 2 --dist worksteal
# what is imported is compiled once, and not by each of the processes that tests start
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help docs demo test test-crosses test-oldest check test-all zoo zoo-oldest test-transformers test-gpu bench cards dist

help:  ## print these targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and by its exact version: what else is installed then takes it as it is. Python compiles what
# is imported, which is a small part of it
$(STAMP): setup.py $(CONSTRAINTS) sparse_hf/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c $(CONSTRAINTS) torch
	$(BIN)/pip install -q --no-compile -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

demo: $(STAMP)  ## fetch two real checkpoints, make them sparse, and compare (under 10 minutes on 2 cores)
	$(BIN)/python examples/demo.py

test: $(STAMP)  ## the fast tests, and a sample of crosses of many parameters
	$(BIN)/python -m pytest $(FAST) $(TESTS)

test-crosses: $(STAMP)  ## what `make test` leaves out of crosses
	$(BIN)/python -m pytest $(FAST) -m "rest and not slow and not gpu and not transformers"

# attention, plans and patterns import no transformers (tests/test_imports.py), and torch, which compiles models, is the same
OLDEST := tests/models tests/conversion tests/train tests/zoo tests/test_examples.py tests/test_registry.py \
	--ignore=tests/train/test_studies.py --ignore=tests/conversion/test_memory.py \
	-m "not slow and not gpu and not transformers and not compiles"

test-oldest:  ## those that have to do with transformers, with the oldest supported one
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TESTS='$(OLDEST)'

check: $(STAMP)  ## lint, format, types, and the table of who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q tests/test_imports.py

test-all: $(STAMP) zoo  ## every test that needs no GPU
	$(BIN)/python -m pytest $(FAST) -m "not gpu and not transformers"

zoo: $(STAMP)  ## try every model type of Transformers, and write docs/zoo.md
	$(BIN)/python -m tests.zoo

zoo-oldest:  ## the same with the oldest supported one, into docs/zoo-oldest.json
	$(MAKE) zoo VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-transformers: $(STAMP)  ## Transformers' own common tests, on our classes beside the dense ones
	$(BIN)/python -m pytest $(FAST) -m transformers tests/transformers

test-gpu: $(STAMP)  ## the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu

docs: $(STAMP)  ## these pages as a site in build/site; a broken link fails
	$(BIN)/pip install -q --no-compile -c $(CONSTRAINTS) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(STAMP)  ## attention beside dense SDPA on this machine, into docs/results
	$(BIN)/sparse-hf bench attention --out docs/results

cards: $(STAMP)  ## write model_cards/ from docs/results
	$(BIN)/python examples/make_cards.py

dist:  ## build wheel and source archive, check them, and use the wheel alone (DEMO=1: also the demo)
	PYTHON=$(PYTHON) .ci/dist
