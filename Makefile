# Everything runs in .venv, which is made on demand. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
DEMO ?=
BENCH ?= conv --suite resnet50

BIN := .venv/bin
READY := .venv/.torch_convlab-installed
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs clean

help: ## list the targets
	@echo "make TARGET, where TARGET is"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(READY) ## train LeNet-5 on real digits, verify and time a ResNet-50, write report.html (DEMO="--quick": options)
	$(BIN)/python -m torch_convlab demo $(DEMO)

test: $(READY) ## run the tests
	$(BIN)/python -m pytest

lint: $(READY) ## check style: ruff for Python, clang-format for C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

bench: $(READY) ## time the kernels against torch's (BENCH="...": what to time)
	$(BIN)/python bench/run.py $(BENCH)

docs: $(READY) ## build the guides and the API reference as HTML into build/docs
	$(BIN)/python -m pip install --quiet -e '.[docs]' --no-build-isolation
	$(BIN)/python -m sphinx -q -b html docs build/docs

clean: ## remove what was built; .venv stays
	rm -rf build dist *.egg-info torch_convlab/*.so $(READY) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Installed in place: changed Python needs nothing, changed C++ compiles what it touches.
$(READY): $(SOURCES) | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install 'torch==2.13.0'
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel ninja 'pybind11>=2.13'
	@echo "building torch_convlab: under 3 minutes the first time, on 2 cores"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[lab,dev]'
	@touch $@
