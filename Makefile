PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
EXTRAS ?= dev,onnx,cuda-check,history,validation
SUITES ?= kernel_size channels resolution equal_flops
STAMP := $(shell date +%Y%m%d-%H%M%S)
GPU_SUITES ?= $(SUITES) training
GPU_DTYPES ?= float32,float16,bfloat16
GPU_IMPLS ?= naive unfold blocked cuda onnx flex_attention conv3x3 conv_kxk depthwise_kxk conv1x1 global_attention
MAIN ?= main
GATE ?=
REFERENCE ?= reports/reference/cpu.jsonl
RESULTS ?= reports/bench-$(STAMP).jsonl
VALIDATION ?= --repeats 20

.PHONY: setup bench bench-gpu report reference reference-pages tensorboard api peers gate gate-validation test test-slurm lint clean

setup: $(VENV)/.ready

# amd-quark is there for the headers of ONNX Runtime that it contains (3 MB); what it depends on is not needed for them.
$(VENV)/.ready: pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[$(EXTRAS)]'
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --no-deps amd-quark
	touch $@

bench: setup
	$(BIN)/sasa-bench run $(SUITES:%=suites/%.toml) --out $(RESULTS)
	$(BIN)/sasa-bench report $(RESULTS)

bench-gpu: setup
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[$(EXTRAS),cuda]'
	$(BIN)/sasa-bench run $(GPU_SUITES:%=suites/%.toml) --device cuda -c dtype=$(GPU_DTYPES) $(GPU_IMPLS:%=--impl %) --out $(RESULTS)
	$(BIN)/sasa-bench report $(RESULTS)

report: setup
	$(BIN)/sasa-bench report $(lastword $(sort $(wildcard reports/*.jsonl)))

gate: setup
	$(BIN)/sasa-bench gate --base $(shell git merge-base HEAD $(MAIN) 2>/dev/null || echo $(MAIN)) --head . $(GATE)

# The gate on code that became slower for a real reason, then beside other tools; stopped, it goes on where it was.
gate-validation: setup
	$(BIN)/python tests/studies/gate_slowdowns.py
	$(BIN)/python tests/studies/gate_validation.py $(VALIDATION)

# A full run of this machine; stopped, it goes on where it was.
reference: setup
	$(BIN)/sasa-bench run suites/*.toml --out $(REFERENCE) --resume
	$(MAKE) reference-pages

reference-pages: setup
	$(BIN)/sasa-bench index $(dir $(REFERENCE))
	$(BIN)/sasa-bench figure $(REFERENCE) --suite kernel_size --suite channels --suite resolution --out $(dir $(REFERENCE))figure.svg

# Without dependencies, which would move torch, and built with the torch that is there.
peers: setup
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --no-deps --no-build-isolation natten timm

tensorboard: setup
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[tensorboard]'
	$(BIN)/tensorboard --logdir $(lastword $(sort $(wildcard reports/profile-*)))/traces

api: setup
	$(BIN)/python docs/api.py docs/api.html

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slurm: setup
	tests/slurm/install.sh
	$(BIN)/pip install --quiet --constraint .ci/constraints.txt --editable '.[$(EXTRAS),slurm]'
	$(BIN)/python -m pytest -m slurm tests/slurm

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/actionlint

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
