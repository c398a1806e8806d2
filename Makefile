# One environment in .venv; every target makes it first if it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# The index of jax's nightly wheels, for example; test-newest takes what is newer there than on PyPI.
JAX_INDEX ?=

.PHONY: demo test test-oldest test-newest lint types docs audit bench results dist dist-check clean

$(VENV)/demo: pyproject.toml  # the library and what the demo needs
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/made: $(VENV)/demo  # and what the experiments, the tests and tools need
	$(BIN)/python -m pip install --quiet --editable ".[experiments]" --group dev
	touch $@

demo: $(VENV)/demo  ## train on digits with SGD, SAM and SSAM; print a table, draw pictures
	$(BIN)/python -m ssam_experiments.demo

test: $(VENV)/made  ## the whole suite, doctests and README included
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-oldest: $(VENV)/made  ## the suite on the lowest versions that pyproject.toml allows
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-oldest
	$(BIN)/uv pip install --quiet --python .venv-oldest --resolution lowest-direct \
		--editable ".[experiments]" --group dev
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal

test-newest: $(VENV)/made  ## the suite on the newest versions, of jax on the newest pre-release
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-newest
	$(BIN)/uv pip install --quiet --python .venv-newest --resolution highest --upgrade \
		--prerelease explicit $(if $(JAX_INDEX),--index-strategy unsafe-best-match --index $(JAX_INDEX)) \
		"jax>=0.dev0" "jaxlib>=0.dev0" --editable ".[experiments]" --group dev
	.venv-newest/bin/python -m ssam_jax
	.venv-newest/bin/python -m pytest -n $(WORKERS) --dist worksteal

audit: $(VENV)/made  ## known vulnerabilities of what an environment made today holds; strict: all must be known
	mkdir -p dist
	$(BIN)/uv pip compile --quiet --no-annotate --extra experiments pyproject.toml --output-file dist/audit.txt
	$(BIN)/uv tool run pip-audit --strict --disable-pip --no-deps --requirement dist/audit.txt

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
	$(BIN)/python -m pytest --quiet tests/website.py

bench: $(VENV)/made  ## every benchmark, into benchmarks/results and docs/performance.md
	$(BIN)/python benchmarks/run.py

results: $(VENV)/made  ## the study of docs/results.md: make results DATA=folder-of-cifar10
	$(BIN)/python -m ssam_experiments.results --data $(DATA)

dist: $(VENV)/made  ## the wheel and the source distribution, in dist
	rm -rf dist
	$(BIN)/python -m hatchling build --directory dist

dist-check: dist  ## the wheel in an environment that holds its declared dependencies alone
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-dist
	$(BIN)/uv pip install --quiet --python .venv-dist dist/*.whl
	cd dist && ../.venv-dist/bin/python -W error -m ssam_jax
	cd dist && ../.venv-dist/bin/python ../.ci/readme.py ../README.md

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-dist dist outputs docs/_build .pytest_cache .mypy_cache .ruff_cache
