# Everything runs in a virtual environment of its own; `make test` and `make demo` make it.
PYTHON ?= python3
VENV ?= .venv
# The release that is tested; any from 2.11 on works.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE_TEXT := find torch_tqattn tests/metal -name '*.cpp' -o -name '*.h' -o -name '*.mm' -o -name '*.metal' | grep -v tables.h
NATIVE := $(shell find torch_tqattn/csrc torch_tqattn/shaders -type f) setup.py pyproject.toml

.PHONY: demo test test-quick test-metal check-metal lint format bench tables clean

demo: $(INSTALLED)
	$(BIN)/python examples/decode_loop.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-quick: $(INSTALLED)
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -m "not slow"

# The tests that take a device, on mps tensors: on Linux those of a double of Metal. Compiles hundreds of shaders.
test-metal: $(INSTALLED)
	TQATTN_HOSTED_MPS=1 HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -m "not slow" -k mps

# The shaders under the rules of Apple's language.
check-metal: $(INSTALLED)
	$(BIN)/python tests/metal/strict/check.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(NATIVE_TEXT) | xargs $(BIN)/clang-format --dry-run --Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(NATIVE_TEXT) | xargs $(BIN)/clang-format -i

bench: $(INSTALLED)
	$(BIN)/python benchmarks/cpu.py

tables: $(INSTALLED)
	$(BIN)/python scripts/make_tables.py

clean:
	rm -rf $(VENV) build *.egg-info torch_tqattn/_C*.so

$(INSTALLED): $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@
