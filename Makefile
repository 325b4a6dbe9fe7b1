# The two commands: `make demo` trains and shows a small text-to-image model; `make test` runs the tests.
# Each builds the environment in .venv when it isn't there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo page test test-slow mutation lint site env clean-demo

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

page: $(READY)  # the web page, with the demo's model
	$(BIN)/python scripts/page.py

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m slow

mutation: $(READY)  # the share of small faults in the code that the tests notice; about two hours
	$(BIN)/python -m tests.mutation

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

site: $(READY)  # the documentation, in site/index.html
	$(BIN)/python docs/build_site.py

clean-demo:
	rm -rf runs/demo data/shapes
