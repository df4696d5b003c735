# `make` or `make help` lists the targets. Those without "GPU" or "image" in their line need no root, Docker or GPU.
# What most of them run stands in recipe/container/targets.py; invoke (tasks.py) carries it out.

# The interpreter to build the virtual environment with; empty: the first of python3.11, python3.12, python3 that suits.
PYTHON ?=
# Where train-tiny generates: embedded (in the trainer's own environment) or sglang (in .venv-sglang).
ENGINE := embedded
# The name of train-tiny's run directory, runs/NAME.
NAME := tiny
# What `make smoke` runs on: all GPUs that there are, NUM_GPUS of them, or with DEVICE=cpu none; PRICE: of one, an hour.
NUM_GPUS :=
DEVICE := auto
PRICE := 2.5
# What `make eval` scores and on which problems; by default the warmed-up tiny model on its held-out sums.
MODEL := build/tiny/hf
DATA := build/tiny/heldout.jsonl
# The folder of GLM-4.7-Flash, its conversion and the data sets.
BASE_DIR := $(or $(BASE_DIR),data)
# DRY_RUN=1 prints the commands of a target, and stops.
DRY_RUN := $(DRY_RUN)
# Further arguments for the command a target ends with, as in: make train-tiny ARGS="--num-rollout 20"
ARGS :=

# What the tiny model's warm-up gets besides, as in WARMUP_ARGS="--num-rollout 2" for a quick look.
WARMUP_ARGS :=

IN_IMAGE := $(wildcard /opt/recipe/provenance.json)
BIN := $(if $(IN_IMAGE),/opt/venv/bin,.venv/bin)
RUN := $(BIN)/python -m
TINY := build/tiny
SEED := 1234
export PYTHON

# A variable's text as one word of a shell.
quote = '$(subst ','\'',$(value $(1)))'

ifeq ($(shell printf %s $(call quote,NAME) | LC_ALL=C grep -czxE '[A-Za-z0-9_][A-Za-z0-9._-]*'),0)
$(error NAME=$(value NAME) is no name of a run: it takes letters, digits, '.', '_' and '-', and is no path)
endif

# What a rule gives invoke besides.
FLAGS :=
INVOKE = $(BIN)/invoke $@ $(if $(DRY_RUN),--dry-run) $(if $(value ARGS),--args $(call quote,ARGS))
ON_GPUS := shell train-8gpu train-8gpu-mtp train-16gpu train-24gpu join bench
INVOKED := image download convert export smoke watch report mismatch $(ON_GPUS)

ifdef DRY_RUN
# Every line of a rule goes to echo instead of a shell; but invoke, where it is installed, says more.
SHELL := /bin/echo
.SHELLFLAGS := +
.SILENT:
help $(if $(wildcard $(BIN)/invoke),$(INVOKED)): private SHELL := /bin/sh
help $(if $(wildcard $(BIN)/invoke),$(INVOKED)): private .SHELLFLAGS := -c
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-sglang image shell download convert plan tune export train-8gpu train-8gpu-mtp train-16gpu train-24gpu join smoke train-tiny eval watch report mismatch test check lint lock bench bench-tiny docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@awk '/^    Target\($$/ {getline name; getline help; gsub(/^ *.|.,$$/, "", name); gsub(/^ *.|.,$$/, "", help); \
		printf "  make %-14s %s\n", name, help}' recipe/container/targets.py

install: ## create .venv with the pinned packages (the other targets do this themselves)
	@$(if $(or $(IN_IMAGE),$(and $(DRY_RUN),$(wildcard $(BIN)/invoke))),,scripts/install.sh .venv cpu project)

install-sglang: ## create .venv-sglang with SGLang for a machine without a GPU
	@scripts/install.sh .venv-sglang sglang-cpu

$(INVOKED): install
	@$(INVOKE) $(FLAGS)

$(ON_GPUS) download: private FLAGS = --base-dir $(call quote,BASE_DIR)
convert: private FLAGS = --hf-checkpoint $(call quote,BASE_DIR)/GLM-4.7-Flash \
	--save $(call quote,BASE_DIR)/GLM-4.7-Flash_torch_dist --recipe glm4.7-flash-8gpu-mtp --verify
export: private FLAGS = --load runs/$(NAME)/checkpoints --save runs/$(NAME)/hf \
	--hf-checkpoint $(call quote,BASE_DIR)/GLM-4.7-Flash --verify
smoke: $(if $(filter sglang,$(ENGINE)),install-sglang)
smoke: private FLAGS = --base-dir $(call quote,BASE_DIR) --device $(call quote,DEVICE) --engine $(call quote,ENGINE) \
	--price $(call quote,PRICE) $(if $(NUM_GPUS),--num-gpus $(call quote,NUM_GPUS))
# Another run to compare with, and where the page of `make watch` is.
WITH :=
PORT := 8642
watch: private FLAGS = --port $(call quote,PORT)
report: private FLAGS = --name $(NAME) $(if $(WITH),--with-run $(call quote,WITH))
# A step that the run NAME kept; default: the newest.
STEP :=
mismatch: private FLAGS = --base-dir $(call quote,BASE_DIR) --name $(NAME) $(if $(STEP),--step $(call quote,STEP))

# A new run never overwrites an old one: the old directory gets the time of its last change as a suffix.
train-tiny: install $(if $(filter sglang,$(ENGINE)),install-sglang) $(TINY)/torch_dist.done ## the whole pipeline on a tiny model: warm-up, conversion, GRPO, evaluation, plots
	@$(if $(findstring --load,$(ARGS)),,[ ! -e runs/$(NAME) ] || \
		mv -v runs/$(NAME) runs/$(NAME)-$$(date -r runs/$(NAME) +%Y%m%d-%H%M%S))
	$(RUN) recipe.train --recipe tiny --name $(NAME) --ref-load $(TINY)/torch_dist --rollout-engine $(call quote,ENGINE) $(ARGS)

# The tiny model knows bare sums and short answers alone.
EVAL_TINY := --instruction "" --n-samples 8 --max-response-len 20
eval: install $(if $(filter $(TINY)/hf,$(MODEL)),$(TINY)/hf.done)
	$(RUN) evaluation.aime --model $(call quote,MODEL) --data $(call quote,DATA) $(if $(filter $(TINY)/hf,$(MODEL)),$(EVAL_TINY)) $(ARGS)

# What `make plan` and `make tune` plan for.
RECIPE := glm4.7-flash-8gpu
plan: install
	$(RUN) recipe.plan --recipe $(call quote,RECIPE) $(ARGS)

# MEASURE=1: by what this node reaches, in the image where there are GPUs.
MEASURE :=
tune: install
	$(if $(MEASURE),$(INVOKE) --measure --base-dir $(call quote,BASE_DIR) --recipe $(call quote,RECIPE),$(RUN) recipe.plan.tune --recipe $(call quote,RECIPE) $(ARGS))

# A file's tests share a worker, and what they start; ARGS="-n 0" for none.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
test: install
	$(RUN) pytest $(PARALLEL) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x scripts/*.sh scripts/models/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

QUICK := tests/config tests/grpo tests/batching tests/plan tests/data tests/rewards tests/run/test_arrows.py tests/run/test_docs.py
check: lint ## lint, types and the quick tests (under 3 minutes on 2 cores)
	$(RUN) pytest $(PARALLEL) $(QUICK) -m 'not slow and not sglang' $(ARGS)

docs: install ## regenerate what is generated in README.md and docs/
	$(BIN)/python scripts/make_docs.py

UV_LOCK := $(BIN)/uv pip compile --quiet --no-config --generate-hashes --no-emit-index-url --no-header $(ARGS)
# torch is installed apart where there may be no GPU.
UV_LOCK_CPU := $(UV_LOCK) --universal --fork-strategy fewest --python-version 3.11 --no-emit-package torch
# The image's platform: Ubuntu 24.04's Python, and a glibc that is new enough for SGLang's wheels.
UV_LOCK_GPU := $(UV_LOCK) --python-version 3.12 --python-platform x86_64-manylinux_2_35 --only-binary :all:

lock: install ## resolve requirements/*.in into requirements/*.lock (pinned versions stay; ARGS=--upgrade renews them)
	$(UV_LOCK_CPU) --excludes requirements/excludes.txt -o requirements/cpu.lock requirements/cpu.in requirements/dev.in >/dev/null
	$(UV_LOCK_CPU) --excludes requirements/excludes.txt -o requirements/bench-trl.lock requirements/bench-trl.in >/dev/null
	$(UV_LOCK_CPU) --excludes requirements/excludes-sglang-cpu.txt -o requirements/sglang-cpu.lock requirements/sglang-cpu.in >/dev/null
	$(UV_LOCK_GPU) --constraints requirements/cpu.lock --overrides requirements/overrides-gpu.txt --excludes requirements/excludes-gpu.txt -o requirements/gpu.lock requirements/cpu.in requirements/gpu.in requirements/dev.in >/dev/null
	cd requirements && LC_ALL=C sh -c 'sha256sum *.in *.lock *.txt >SHA256SUMS'

bench-tiny: install $(TINY)/torch_dist.done ## compare with TRL's GRPOTrainer on the tiny model (samples/s, time to held-out reward 0.9)
	$(BIN)/python scripts/bench_tiny.py $(ARGS)

clean: ## remove everything that was built (environments, build/, caches); runs/ stays
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find recipe tests scripts -name __pycache__ -prune -exec rm -rf {} +

# The tiny model's warm-up, each step once: a NAME.done file is the last thing a step leaves behind.

$(TINY)/data.done: recipe/data/arithmetic_task.py | install
	$(RUN) recipe.data.arithmetic_task --output $(TINY) --seed $(SEED)
	@touch $@

$(TINY)/init.done: recipe/weights/tiny.py recipe/data/tiny_tokenizer.py | install
	$(RUN) recipe.weights.tiny --output $(TINY)/init --seed $(SEED)
	@touch $@

$(TINY)/hf.done: $(TINY)/data.done $(TINY)/init.done recipe/config/recipes/tiny-sft.toml
	rm -rf runs/tiny-sft $(TINY)/hf
	$(RUN) recipe.train --recipe tiny-sft --hf-checkpoint $(TINY)/init --save-hf $(TINY)/hf $(WARMUP_ARGS)
	@touch $@

$(TINY)/torch_dist.done: $(TINY)/hf.done
	rm -rf $(TINY)/torch_dist
	$(RUN) recipe.conversion.convert --hf-checkpoint $(TINY)/hf --save $(TINY)/torch_dist --mtp-num-layers 1
	@touch $@
