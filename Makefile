# Each of demo and test builds .venv and installs what it needs there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test gpu lint clean

demo: $(VENV)/demo
	$(BIN)/python examples/quickstart.py
	$(BIN)/python examples/roi_pooling.py

test: $(VENV)/test
	# tests marked gpu run on the fake device of tests/fake_cuda; what it cannot run is skipped and says so
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto -rs

# On a machine with a CUDA device, in the environment that is there: nothing is installed.
gpu:
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -m gpu
	$(PYTHON) benchmarks/gpu.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info

# one stamp file per set of extras, older than pyproject.toml when that has changed
$(VENV)/demo $(VENV)/test $(VENV)/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing cudcn[$(@F)] into $(VENV)"
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --editable ".[$(@F)]"
	touch $@
