# Everything runs in a virtual environment of its own; every target makes it.
PYTHON ?= python3
VENV ?= .venv
# The release that is tested; any from 2.11 on works.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
# One process a core.
PYTEST := $(BIN)/python -m pytest -n auto --durations 10
# The library and what the examples need; what tests, benchmarks and linters need besides.
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
NATIVE_TEXT := find torch_tqattn tests/metal tests/neon benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.mm' -o -name '*.metal' | grep -v tables.h
WORKFLOWS := $(wildcard .github/workflows/*.yml)
NATIVE := $(shell find torch_tqattn/csrc torch_tqattn/shaders -type f) setup.py pyproject.toml

.PHONY: demo install doctor test test-quick test-metal test-mutations check-metal check-sdk check-cuda lint format bench tables clean

demo: $(INSTALLED)
	$(BIN)/python examples/decode_loop.py

install: $(TOOLS)

# What a bug report needs, and every operator on every device that is here.
doctor: $(INSTALLED)
	$(BIN)/python -m torch_tqattn doctor

test: $(TOOLS)
	$(PYTEST) --dist loadfile --no-loadscope-reorder

test-quick: $(TOOLS)
	HYPOTHESIS_PROFILE=quick $(PYTEST) --dist loadfile --no-loadscope-reorder -m "not slow"

# The tests that take a device, on mps tensors: on Linux those of a double of Metal. Compiles hundreds of shaders.
# MODE=race looks for races, at a third of the speed.
MODE ?= plain
test-metal: $(TOOLS)
	TQATTN_HOSTED_MPS=1 TQATTN_METAL_MODE=$(MODE) HYPOTHESIS_PROFILE=quick $(PYTEST) --dist worksteal -m "not slow" -k mps

# Faults in shaders, launch plans and Objective-C++, each of which the tests have to notice.
test-mutations: $(TOOLS)
	$(BIN)/python tests/metal/mutations.py

# The shaders under the rules of Apple's language.
check-metal: $(TOOLS)
	$(BIN)/python tests/metal/strict/check.py

# The Objective-C++ with Apple's own headers: make check-sdk SDK=.../MacOSX.sdk, from Xcode 15 or newer.
check-sdk: $(TOOLS)
	$(BIN)/python tests/metal/linked/sdk.py $(or $(SDK),$(error set SDK to the folder of a macOS SDK))

# Every kernel under compute-sanitizer, on an NVIDIA GPU. Without PyTorch's cache each tensor is an allocation of its own.
check-cuda: $(TOOLS)
	for tool in memcheck racecheck initcheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    $(BIN)/python -m pytest -p no:cacheprovider -k 'cuda and (test_kernels or half_precision or codes_a_block)' \
	      tests/test_kernels.py tests/test_cuda.py || exit 1; \
	done

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(NATIVE_TEXT) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows $(WORKFLOWS)
	$(BIN)/zizmor --offline --quiet .github

format: $(TOOLS)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(NATIVE_TEXT) | xargs $(BIN)/clang-format -i

bench: $(TOOLS)
	$(BIN)/python benchmarks/cpu.py

tables: $(TOOLS)
	$(BIN)/python scripts/make_tables.py

clean:
	rm -rf $(VENV) build *.egg-info torch_tqattn/_C*.so

$(INSTALLED): $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 is needed: make PYTHON=python3.13")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel ninja
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[examples]'
	touch $@

# pip finds the package under its name, adds what these extras lack, and builds nothing again.
$(TOOLS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'torch_tqattn[dev]'
	touch $@
