PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# What a run needs, and what tests and checks of the code add. Where pip finds a CPU build of torch, it takes that.
RUN_EXTRAS = history onnx parquet
DEV_EXTRAS = dev
GPU_EXTRAS = $(RUN_EXTRAS) cuda gpu-check
SUITES ?= kernel_size channels resolution equal_flops
STAMP := $(shell date +%Y%m%d-%H%M%S)
GPU_SUITES ?= $(SUITES) training
GPU_DTYPES ?= float32,tf32,float16,bfloat16
# Without what compiles for each case, which takes hours here: make bench-gpu GPU_IMPLS="flex_attention conv3x3_channels_last".
GPU_IMPLS ?= naive unfold blocked cuda triton onnx sdpa_dense \
    conv3x3 conv3x3_channels_last conv_kxk depthwise_kxk conv1x1 global_attention
MAIN ?= main
GATE ?=
REFERENCE ?= reports/reference/cpu.jsonl
RESULTS ?= reports/bench-$(STAMP).jsonl
VALIDATION ?= --repeats 20

ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(VENV)/bin/python),)
ifneq ($(shell $(PYTHON) --version),$(shell $(BIN)/python --version))
$(error $(VENV) holds $(shell $(BIN)/python --version), and PYTHON is $(shell $(PYTHON) --version): run make clean, or add VENV=.venv-other)
endif
endif
endif

.PHONY: setup setup-dev setup-gpu lock resolve bench bench-gpu gpu-check report reference reference-pages tensorboard docs peers \
    gate gate-validation test test-all test-quick test-slurm lint check dist clean

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev
setup-gpu: $(VENV)/.ready-gpu

INSTALL = .ci/install pyproject.toml .ci/constraints.txt .ci/no-deps.txt

$(VENV)/.ready: $(INSTALL)
	.ci/install $(PYTHON) $(VENV) $(RUN_EXTRAS)
	touch $@

$(VENV)/.ready-dev: $(INSTALL)
	.ci/install $(PYTHON) $(VENV) $(DEV_EXTRAS)
	touch $@ $(VENV)/.ready

$(VENV)/.ready-gpu: $(INSTALL)
	.ci/install $(PYTHON) $(VENV) $(GPU_EXTRAS)
	touch $@

# Renews the constraints: make lock UPGRADE=--upgrade takes the newest versions.
lock: setup-dev
	PATH="$(abspath $(BIN)):$$PATH" .ci/lock $(UPGRADE)

# Every set-up has a solution where only public packages are.
resolve: setup-dev
	PATH="$(abspath $(BIN)):$$PATH" .ci/resolve

print-%:
	@echo $($*)

bench: setup
	$(BIN)/sasa-bench run $(SUITES:%=suites/%.toml) --out $(RESULTS)
	$(BIN)/sasa-bench report $(RESULTS)

bench-gpu: setup-gpu
	$(BIN)/sasa-bench prebuild $(GPU_SUITES:%=suites/%.toml) -c dtype=$(GPU_DTYPES)
	$(BIN)/sasa-bench run $(GPU_SUITES:%=suites/%.toml) --device cuda -c dtype=$(GPU_DTYPES) $(GPU_IMPLS:%=--impl %) --out $(RESULTS)
	$(BIN)/sasa-bench report $(RESULTS)

# Checks a GPU in at most nine minutes; needs no network and none of the set-up. Stopped, it resumes.
gpu-check:
	$(if $(wildcard $(VENV)/.ready-gpu),$(BIN)/python,$(PYTHON)) tests/cuda/gpu_check.py

report: setup
	$(BIN)/sasa-bench report $(lastword $(sort $(wildcard reports/*.jsonl)))

gate: setup
	$(BIN)/sasa-bench gate --base $(MAIN) --merge-base --head . $(GATE)

# The gate on code that became slower for a real reason, then beside other tools; stopped, it goes on where it was.
gate-validation: setup-dev
	$(BIN)/python tests/studies/gate_slowdowns.py
	$(BIN)/python tests/studies/gate_validation.py $(VALIDATION)

# A full run of this machine; stopped, it goes on where it was.
reference: setup
	$(BIN)/sasa-bench run suites/*.toml --out $(REFERENCE) --resume
	$(MAKE) reference-pages

# Pages of all results files in the folder of REFERENCE, their comparison and history, and the tables that quote them.
reference-pages: setup
	$(BIN)/sasa-bench index $(dir $(REFERENCE))
	$(BIN)/python docs/tables.py

# Without dependencies, which would move torch, and built with the torch that is there.
peers: setup-dev
	$(BIN)/pip install --quiet --constraint .ci/no-deps.txt --no-deps --no-build-isolation natten timm

tensorboard: setup
	@test -n "$(wildcard reports/profile-*)" || { echo "reports/ holds no profile: sasa-bench profile SUITE --impl NAME writes one"; exit 1; }
	.ci/install $(PYTHON) $(VENV) tensorboard
	$(BIN)/tensorboard --logdir $$(ls -td reports/profile-*/ | head -1)traces

# The documentation site, in site/.
docs: setup-dev
	$(BIN)/python -m mkdocs build --strict --quiet

test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 25

# Also what repeats in more builds and sizes what `make test` shows.
test-all: setup-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 25 --exhaustive

test-slurm: setup-dev
	tests/slurm/install.sh
	.ci/install $(PYTHON) $(VENV) slurm
	$(BIN)/python -m pytest -m slurm tests/slurm

lint: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/actionlint
	$(BIN)/codespell
	$(BIN)/python docs/prose.py

# The daily loop, in less than a minute on two cores: lint, and beside it the tests of what needs no worker, no browser and
# no compiler.
QUICK_TESTS = tests/test_case.py tests/test_suite.py tests/test_docs.py tests/ops tests/results tests/sweep/test_shard.py \
    tests/gate/test_verdicts.py tests/gate/test_outputs.py tests/gate/test_points.py tests/gate/test_bisect.py \
    tests/report/test_table.py tests/report/test_services.py tests/report/test_baselines.py
check: setup-dev
	$(MAKE) --jobs 2 --output-sync lint test-quick

test-quick: setup-dev
	$(BIN)/python -m pytest -q -m "not slow" $(QUICK_TESTS)

dist: setup-dev
	rm -rf build dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
