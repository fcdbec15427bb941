# Each of demo, test, test-models and lint makes .venv and installs what it needs there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-models gpu lint oldest clean
.NOTPARALLEL:  # all install into the one .venv

demo: $(VENV)/demo
	$(BIN)/python examples/quickstart.py
	$(BIN)/python examples/roi_pooling.py

test: $(VENV)/test
	# tests marked gpu run on the fake device of tests/fake_cuda; what it cannot run is skipped and says so
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto -rs

# Models of Hugging Face transformers on these operators; `make test` runs them too once they are installed.
test-models: $(VENV)/models
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto -m models

# On a machine with a CUDA device, in the environment that is there: nothing is installed.
gpu:
	@$(PYTHON) -c "$$GPU_NEEDS"
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) -m pytest -m gpu
	$(PYTHON) benchmarks/gpu.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The CPU path on the lowest versions that pyproject.toml allows, in an environment of its own.
oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install ml_dtypes pytest hypothesis $$($(PYTHON) -c "$$FLOORS")
	$(VENV)-oldest/bin/python -m pytest tests/test_cpu_path.py tests/test_check.py tests/test_bad_input.py

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist *.egg-info

# One stamp file per set of extras, older than pyproject.toml when that has changed. A .venv without pip is one that was
# left half made, for want of Debian's python3-venv; making it once more completes it.
$(VENV)/demo $(VENV)/test $(VENV)/models $(VENV)/dev: pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c "$$RECENT" || exit 1; \
	  $(PYTHON) -m venv $(VENV) || { \
	    echo "$(VENV) could not be made. On Debian and Ubuntu: apt-get install python3-venv. Else: make clean, and again."; \
	    exit 1; }; }
	@echo "installing cudcn[$(@F)] into $(VENV)"
	$(BIN)/python -m pip install --editable ".[$(@F)]"
	touch $@

define RECENT
import sys
if sys.version_info < (3, 11):
    sys.exit(f"cudcn needs Python 3.11 or later, this is {sys.version.split()[0]}; another: make PYTHON=python3.12")
endef

define FLOORS
import tomllib
with open("pyproject.toml", "rb") as file:
    print(*(need.replace(">=", "==") for need in tomllib.load(file)["project"]["dependencies"]))
endef

define GPU_NEEDS
from importlib.util import find_spec
import sys
names = "numpy scipy ml_dtypes cupy torch pytest hypothesis".split()
lacking = [name for name in names if not find_spec(name)]
if not lacking and not find_spec("cudcn.torch"):
    lacking = ["cudcn"]  # its folders lie under their installed names only once it is installed
if lacking:
    sys.exit(
        f"make gpu installs nothing, and {sys.executable} lacks {', '.join(lacking)}. It needs:\n"
        "  pip install --editable '.[torch,cuda13]' pytest hypothesis   (cuda12 beside a torch for CUDA 12)"
    )
endef
export RECENT FLOORS GPU_NEEDS
