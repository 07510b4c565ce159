# Everything runs in a virtual environment of its own; `make test` and `make demo` make it.
PYTHON ?= python3
VENV ?= .venv
# The release that is tested; any from 2.11 on works.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NATIVE := $(shell find torch_tqattn/csrc torch_tqattn/shaders -type f) setup.py pyproject.toml

.PHONY: demo test test-quick lint format bench tables clean

demo: $(INSTALLED)
	$(BIN)/python examples/decode_loop.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-quick: $(INSTALLED)
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -m "not slow"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find torch_tqattn -name '*.cpp' -o -name '*.h' | grep -v tables.h | xargs $(BIN)/clang-format --dry-run --Werror

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find torch_tqattn -name '*.cpp' -o -name '*.h' | grep -v tables.h | xargs $(BIN)/clang-format -i

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
