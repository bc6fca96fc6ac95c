# `make demo` and `make test` need Python 3.11, make and nothing else installed.
PYTHON ?= python3
PYTHON312 ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyro_hamflow tests tutorials benchmarks docs

.PHONY: demo paper lecture test test-gpu slow lint types format bench clean
.PHONY: dist test-wheel versions floors test-arviz1 docs docs-look gallery

demo: $(VENV)/demo
	$(BIN)/python tutorials/quickstart.py

paper: $(VENV)/demo
	cd tutorials/paper && ../../$(BIN)/python nine_modes.py
	cd tutorials/paper && ../../$(BIN)/python robustness.py
	cd tutorials/paper && ../../$(BIN)/python supernova.py

lecture: $(VENV)/demo
	cd tutorials/lecture && for system in *.py; do ../../$(BIN)/python $$system || exit 1; done

test: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist worksteal

test-gpu: $(VENV)/test  # says where there is no CUDA device
	$(BIN)/python -m pytest tests/package/test_devices.py -rs

slow: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist worksteal --slow

lint: $(VENV)/test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/test
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/test
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.run

# A wheel and an archive of sources, built twice to see that they come out the same.
dist: $(VENV)/dist
	rm -rf dist build/again
	SOURCE_DATE_EPOCH=0 $(BIN)/python -m build --quiet --no-isolation
	SOURCE_DATE_EPOCH=0 $(BIN)/python -m build --quiet --no-isolation --outdir build/again
	cd build/again && sha256sum * | (cd ../../dist && sha256sum --check)
	$(BIN)/twine check --strict dist/*

# The wheel in an environment of its own: what ships with it, and the archive's tests of results.
test-wheel: dist
	rm -rf build/wheel && $(PYTHON) -m venv build/wheel && mkdir build/wheel/away
	build/wheel/bin/python -m pip install --quiet -c constraints.txt dist/*.whl pytest zuko scipy arviz-stats
	cd build/wheel/away && ../bin/python -m pytest -q -p no:cacheprovider --doctest-modules \
		--pyargs pyro_hamflow
	tar -xzf dist/*.tar.gz -C build/wheel && rm -r build/wheel/pyro_hamflow-*/pyro_hamflow
	cd build/wheel/pyro_hamflow-* && ../bin/python -m pytest -p no:cacheprovider $(RESULTS)

# What PYTHON serves for: the lowest versions and the wheel, or from 3.12 on ArviZ 1.x.
versions:
	$(MAKE) PYTHON312=$(PYTHON) $$($(PYTHON) -c \
		"import sys; print('test-arviz1' if sys.version_info >= (3, 12) else 'floors test-wheel')")

# The lowest versions that are stated; and ArviZ 1.x, which needs Python 3.12 or later.
RESULTS := tests/results tests/mcmc/test_messages.py tests/smc/test_importance.py

floors: pyproject.toml floors.txt
	rm -rf build/floors && $(PYTHON) -m venv build/floors
	build/floors/bin/python -m pip install --quiet -c floors.txt -e '.[flows]' matplotlib pytest scipy
	build/floors/bin/python -m pytest -p no:cacheprovider $(RESULTS) tests/mcmc/test_truth.py

test-arviz1: pyproject.toml
	rm -rf build/arviz1 && $(PYTHON312) -m venv build/arviz1
	build/arviz1/bin/python -m pip install --quiet -e '.[tutorials]' 'arviz>=1' pytest scipy
	build/arviz1/bin/python -m pytest -p no:cacheprovider $(RESULTS)
	cd build/arviz1 && SMOKE=1 MPLBACKEND=Agg bin/python ../../tutorials/quickstart.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[tutorials]'
	touch $@

$(VENV)/test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,tutorials]'
	touch $@

$(VENV)/bench: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,tutorials,bench]'
	touch $@

# The site, without a network; screenshots of six of its pages; and what its gallery shows.
docs: $(VENV)/docs
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build/html

docs-look: docs  # needs chromium
	$(BIN)/python docs/look.py

gallery: $(VENV)/docs
	$(BIN)/python docs/figures/drawings.py
	$(BIN)/python docs/figures/statistics.py
	$(BIN)/python docs/gallery.py

$(VENV)/docs: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

$(VENV)/dist: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -c constraints.txt build hatchling twine
	touch $@

clean:
	rm -rf $(VENV) build dist docs/_build
