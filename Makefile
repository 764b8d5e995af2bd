# Everything runs in .venv, which is made on demand. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
DEMO ?=
BENCH ?= all

# The kernels of every algorithm, pass and memory format, without the slow definition and the float64 copies of them.
SANITIZED ?= tests/test_convolution.py tests/test_convolution_values.py tests/test_fused.py tests/test_runs.py tests/test_strips.py tests/test_pooling.py tests/test_normalization.py -k "not naive and not float64 and not compilers"
STAGES ?= build test bench sanitize
OUT ?= bench/results

BIN := .venv/bin
READY := .venv/.torch_convlab-installed
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench sanitize docs clean cuda-check gpu emulator-sanitize

help: ## list the targets
	@echo "make TARGET, where TARGET is"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(READY) ## train LeNet-5 on real digits, verify and time a ResNet-50, write report.html (DEMO="--quick": options)
	$(BIN)/python -m torch_convlab demo $(DEMO)

test: $(READY) ## run the tests
	$(BIN)/python -m pytest

lint: $(READY) ## check style: ruff for Python, clang-format for C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: $(READY) ## time the kernels against torch's, all of it in 25 minutes (BENCH="conv --suite vgg16": a part)
	$(BIN)/python bench/run.py $(BENCH)

sanitize: $(READY) ## run the C++-heavy tests under AddressSanitizer and UBSan, in a copy under build/ (15 minutes; over 40 on a slow machine)
	rm -rf build/sanitized && mkdir -p build/sanitized
	cp -r csrc torch_convlab tests setup.py pyproject.toml README.md LICENSE build/sanitized
	rm -f build/sanitized/torch_convlab/*.so
	cd build/sanitized && SANITIZE=address,undefined $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitized && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider $(SANITIZED)

docs: $(READY) ## build the guides and the API reference as HTML into build/docs
	$(BIN)/python -m pip install --quiet -e '.[docs]' --no-build-isolation
	$(BIN)/python -m sphinx -q -b html docs build/docs

cuda-check: $(READY) ## compile the CUDA kernels with nvcc and check registers, spills and machine code; no GPU needed
	@$(BIN)/python -m pip install --quiet nvidia-cuda-nvdisasm || true
	$(BIN)/python tools/cuda_check.py

emulator-sanitize: $(READY) ## run the CUDA kernels in the emulator under AddressSanitizer and ThreadSanitizer
	$(BIN)/python tools/sanitize.py address thread

gpu: ## on a machine with a GPU: build, test and time the CUDA kernels (STAGES="build test bench sanitize", OUT=folder)
	$(PYTHON) tools/gpu.py --out $(OUT) $(STAGES)

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info torch_convlab/*.so $(READY) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Installed in place: changed Python needs nothing, changed C++ compiles what it touches.
$(READY): $(SOURCES) | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel ninja
	@echo "building torch_convlab: 3 to 11 minutes the first time, on 2 cores"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[lab,dev]'
	@touch $@
