# One environment in .venv; every target makes it first if it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# Versions with their hashes, to install these and no others, as CI does: make test LOCK=requirements/ci.txt
LOCK ?=

# The index of jax's nightly wheels, for example; test-newest takes jax and jaxlib from there, and nothing else.
JAX_INDEX ?=

.PHONY: demo test test-oldest test-newest lint types docs audit lock bench results soak dist dist-check clean

ifeq ($(LOCK),)
$(VENV)/demo: pyproject.toml  # the library and what the demo needs
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@
else
$(VENV)/demo: pyproject.toml $(LOCK)  # what the library, the tests and all tools need, and then the library
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --only-binary :all: --requirement $(LOCK)
	$(BIN)/python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
	touch $@
endif

group = $(if $(LOCK),,$(BIN)/python -m pip install --quiet --group $(1))  # the lock has all groups

$(VENV)/made: $(VENV)/demo  # and what the experiments, the tests and tools need
	$(if $(LOCK),,$(BIN)/python -m pip install --quiet --editable ".[experiments]")
	$(call group,dev)
	touch $@

$(VENV)/audited: $(VENV)/made
	$(call group,audit)
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
	$(BIN)/uv pip install --quiet --python .venv-newest --resolution highest --prerelease explicit --no-deps \
		$(if $(JAX_INDEX),--default-index $(JAX_INDEX)) "jax>=0.dev0" "jaxlib>=0.dev0"
	$(BIN)/uv pip freeze --python .venv-newest > .venv-newest/jax.txt
	$(BIN)/uv pip install --quiet --python .venv-newest --resolution highest --prerelease explicit \
		--constraint .venv-newest/jax.txt --editable ".[experiments]" --group dev
	.venv-newest/bin/python -m ssam_jax
	.venv-newest/bin/python -m pytest -n $(WORKERS) --dist worksteal

EVERYTHING := --all-extras --group audit --group dev --group docs pyproject.toml

audit: $(VENV)/audited  ## known vulnerabilities, strict, of the lock and of what would be installed today
	mkdir -p dist
	$(BIN)/uv pip compile --quiet --no-annotate --generate-hashes $(EVERYTHING) --output-file dist/audit.txt
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements/ci.txt
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement dist/audit.txt

lock: $(VENV)/made  ## renew requirements/ci.txt: the newest versions for each Python and system, with their hashes
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate --generate-hashes \
		--custom-compile-command "make lock" $(EVERYTHING) --output-file requirements/ci.txt

lint: $(VENV)/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/made
	$(BIN)/mypy

$(VENV)/documented: $(VENV)/made
	$(call group,docs)
	touch $@

docs: $(VENV)/documented  ## the site, in docs/_build/html; every code block runs, every public name is in it
	$(BIN)/python -m pytest --quiet -n $(WORKERS) tests/test_readme.py tests/guides.py
	$(BIN)/python -m pytest --quiet tests/website.py

bench: $(VENV)/made  ## every benchmark, into benchmarks/results and docs/performance.md
	$(BIN)/python benchmarks/run.py

results: $(VENV)/made  ## the study of docs/results.md: make results DATA=folder-of-cifar10
	$(BIN)/python -m ssam_experiments.results --data $(DATA)

MINUTES ?= 20

soak: $(VENV)/demo  ## kill, damage and starve runs at random and resume them; the table of docs/reliability.md
	$(BIN)/python -m ssam_experiments.soak --minutes $(MINUTES)

dist: $(VENV)/audited  ## the wheel, the source distribution, and a bill of materials: what the wheel runs on
	rm -rf dist
	$(BIN)/python -m hatchling build --directory dist
	$(BIN)/uv pip compile --quiet --no-annotate --generate-hashes --constraint requirements/ci.txt \
		pyproject.toml --output-file dist/requirements.txt
	sed "s/^dynamic = .*/version = \"$$($(BIN)/python -m hatchling version)\"/" pyproject.toml > dist/pyproject.toml
	$(BIN)/cyclonedx-py requirements dist/requirements.txt --pyproject dist/pyproject.toml --mc-type library \
		--output-reproducible --output-format JSON --output-file dist/ssam_jax.cdx.json
	rm dist/requirements.txt dist/pyproject.toml

dist-check: dist  ## the wheel in an environment that holds its declared dependencies alone
	$(BIN)/uv venv --quiet --clear --python $(PYTHON) .venv-dist
	$(BIN)/uv pip install --quiet --python .venv-dist dist/*.whl
	cd dist && ../.venv-dist/bin/python -W error -m ssam_jax
	cd dist && ../.venv-dist/bin/python ../.ci/readme.py ../README.md

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-dist dist outputs docs/_build .pytest_cache .mypy_cache .ruff_cache
