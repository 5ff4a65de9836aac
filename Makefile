# make help      these lines
# make env       the environment in .venv, from requirements.lock; nothing is done twice
# make demo      the environment, then the main job on the embedded default
# make test      lint, types, floors, then the tests that need no more than minutes
# make test-full what takes longer as well; can be cut off and run again
# make lock      compile requirements.lock anew from pyproject.toml
# make docs      write docs/parts/ from the docstrings
# make clean     remove the environment and the caches
# Another Python than python3: make PYTHON=python3.12

UV_VERSION := 0.13.9
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
UV := .uv/bin/uv

export NNCF_CI := 1

.PHONY: help env demo test test-full lint lock docs clean

help:
	@sed -n 's/^# \(make \|Another\)/\1/p' Makefile

env: $(READY)

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'lissom needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 2; }
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

.venv/bin/python: | $(UV)
	$(UV) venv --quiet --no-python-downloads --python $(PYTHON) .venv

$(READY): requirements.lock pyproject.toml | .venv/bin/python $(UV)
	$(UV) pip sync --quiet --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $(READY)

demo: $(READY)
	$(BIN)/lissom slim --out runs/demo-$$(date +%Y%m%d-%H%M%S)-$$$$

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Two at a time: most tests compute on one thread. OpenMP would start a thread a processor in each.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not full"

# Cut off, it goes on where it was: what passed is left out until a file changes.
test-full: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --resume

lock: | $(UV)
	$(UV) pip compile --quiet --universal --generate-hashes --extra onnx --extra dev pyproject.toml -o requirements.lock

docs: $(READY)
	$(BIN)/python docs/make.py

clean:
	rm -rf .venv .uv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
