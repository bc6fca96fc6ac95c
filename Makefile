# `make demo` and `make test` need Python 3.11, make and nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyro_hamflow tests tutorials benchmarks

.PHONY: demo paper lecture test test-gpu slow lint types format bench clean

demo: $(VENV)/demo
	$(BIN)/python tutorials/quickstart.py

paper: $(VENV)/demo
	cd tutorials/paper && ../../$(BIN)/python nine_modes.py
	cd tutorials/paper && ../../$(BIN)/python robustness.py
	cd tutorials/paper && ../../$(BIN)/python supernova.py

lecture: $(VENV)/demo
	cd tutorials/lecture && for system in *.py; do ../../$(BIN)/python $$system || exit 1; done

test: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist loadfile

test-gpu: $(VENV)/test  # says where there is no CUDA device
	$(BIN)/python -m pytest tests/package/test_devices.py -rs

slow: $(VENV)/test
	$(BIN)/python -m pytest -n auto --dist loadfile --slow

lint: $(VENV)/test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/test
	$(BIN)/mypy

format: $(VENV)/test
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.run

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

clean:
	rm -rf $(VENV)
