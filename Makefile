# One environment in .venv; every target makes it first if it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-oldest lint types docs bench results clean

$(VENV)/made: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[examples]" --group dev
	touch $@

demo: $(VENV)/made  ## train on digits with SGD, SAM and SSAM; print a table, draw pictures
	$(BIN)/python examples/digits.py

test: $(VENV)/made  ## the whole suite, doctests and README included
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-oldest: $(VENV)/made  ## the suite on the lowest versions that pyproject.toml allows
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-oldest
	$(BIN)/uv pip install --quiet --python .venv-oldest --resolution lowest-direct \
		--editable ".[examples]" --group dev
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/made
	$(BIN)/mypy

$(VENV)/documented: $(VENV)/made
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

docs: $(VENV)/documented  ## the site, in docs/_build/html; every code block runs, every public name is in it
	$(BIN)/python -m pytest --quiet -n $(WORKERS) tests/test_readme.py tests/guides.py
	$(BIN)/python -m sphinx --builder html --nitpicky --fail-on-warning --quiet --fresh-env docs docs/_build/html

bench: $(VENV)/made  ## every benchmark, into benchmarks/results and docs/performance.md
	$(BIN)/python benchmarks/run.py

results: $(VENV)/made  ## the study of docs/results.md: make results DATA=folder-of-cifar10
	$(BIN)/python examples/results.py --data $(DATA)

clean:
	rm -rf $(VENV) .venv-oldest outputs docs/_build .pytest_cache .mypy_cache .ruff_cache
