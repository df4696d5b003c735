# `make` or `make help` lists the targets. Those without "GPU" or "image" in their line need no root, Docker or GPU.

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
MODEL = $(TINY)/hf
DATA = $(TINY)/heldout.jsonl
# The folder of GLM-4.7-Flash, its conversion and the data sets.
BASE_DIR := $(or $(BASE_DIR),data)
# DRY_RUN=1 prints the command of a target that invoke carries out, and stops.
DRY_RUN :=
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

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install install-sglang image shell download convert plan export train-8gpu train-8gpu-mtp train-16gpu train-24gpu join smoke train-tiny eval report test lint lock bench bench-tiny clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## create .venv with the pinned packages (the other targets do this themselves)
	@$(if $(IN_IMAGE),:,scripts/install.sh .venv cpu project)

# A new run never overwrites an old one: the old directory gets the time of its last change as a suffix.
define KEEP_EARLIER_RUN
if [ -e runs/$(NAME) ]; then \
	kept=runs/$(NAME)-$$(date -r runs/$(NAME) +%Y%m%d-%H%M%S); mv runs/$(NAME) $$kept; echo "the earlier runs/$(NAME) is now $$kept"; \
fi
endef

install-sglang: ## create .venv-sglang with SGLang for a machine without a GPU
	@scripts/install.sh .venv-sglang sglang-cpu

INVOKE = $(BIN)/invoke $(1) $(if $(DRY_RUN),--dry-run) $(if $(ARGS),--args '$(ARGS)')

image: install ## build the image with everything that the GPU targets need (about 7 minutes)
	@$(call INVOKE,image)

shell: install ## open a shell in the image, with the GPUs
	@$(call INVOKE,shell --base-dir '$(BASE_DIR)')

download: install ## model and data sets into BASE_DIR, pinned and verified (about 60 GB)
	@$(call INVOKE,download --base-dir '$(BASE_DIR)')

CONVERTED := GLM-4.7-Flash_torch_dist
convert: install ## BASE_DIR/GLM-4.7-Flash into the form that training starts from, MTP layer included (60 GB more)
	@$(BIN)/invoke convert $(if $(DRY_RUN),--dry-run) --hf-checkpoint '$(BASE_DIR)/GLM-4.7-Flash' \
		--save '$(BASE_DIR)/$(CONVERTED)' --recipe glm4.7-flash-8gpu-mtp --verify $(if $(ARGS),--args '$(ARGS)')

# The newest checkpoint of the run NAME, as a Hugging Face directory.
export: install ## runs/NAME's newest checkpoint into runs/NAME/hf
	@$(BIN)/invoke export $(if $(DRY_RUN),--dry-run) --load runs/$(NAME)/checkpoints --save runs/$(NAME)/hf \
		--hf-checkpoint '$(BASE_DIR)/GLM-4.7-Flash' --verify $(if $(ARGS),--args '$(ARGS)')

train-8gpu: install ## train on one node of 8 GPUs, in the image
	@$(call INVOKE,train-8gpu --base-dir '$(BASE_DIR)')

train-8gpu-mtp: install ## the same, with the MTP layer trained and drafting, in the image
	@$(call INVOKE,train-8gpu-mtp --base-dir '$(BASE_DIR)')

train-16gpu: install ## train on two nodes of 8 GPUs: MASTER_ADDR is this one, BASE_DIR shared; in the image
	@$(call INVOKE,train-16gpu --base-dir '$(BASE_DIR)')

train-24gpu: install ## train on three nodes of 8 GPUs, in the image
	@$(call INVOKE,train-24gpu --base-dir '$(BASE_DIR)')

join: install ## on every other node of such a run: join the one at MASTER_ADDR, in the image with its GPUs
	@$(call INVOKE,join --base-dir '$(BASE_DIR)')

smoke: install $(if $(filter sglang,$(ENGINE)),install-sglang) ## whether this node is good, by the whole loop on a small model; in the image if there are GPUs: make smoke NUM_GPUS=2 PRICE=3
	@$(call INVOKE,smoke --base-dir '$(BASE_DIR)' --device $(DEVICE) --price $(PRICE) $(if $(NUM_GPUS),--num-gpus $(NUM_GPUS)) \
		--engine $(ENGINE))

report: install ## what the run NAME achieved, and where its time went
	@$(call INVOKE,report --name '$(NAME)')

bench: install ## the trainer's speed on one GPU beside transformers', in the image
	@$(call INVOKE,bench)

train-tiny: install $(if $(filter sglang,$(ENGINE)),install-sglang) $(TINY)/torch_dist.done ## the whole pipeline on a tiny model: warm-up, conversion, GRPO, evaluation, plots
	@$(if $(findstring --load,$(ARGS)),,$(KEEP_EARLIER_RUN))
	$(RUN) recipe.train --recipe tiny --name $(NAME) --ref-load $(TINY)/torch_dist --rollout-engine $(ENGINE) $(ARGS)

# The tiny model knows bare sums and short answers alone.
EVAL_TINY := --instruction "" --n-samples 8 --max-response-len 20
eval: install $(if $(filter $(TINY)/hf,$(MODEL)),$(TINY)/hf.done) ## score a model: make eval MODEL=DIR DATA=aime.jsonl (default: the tiny model)
	$(RUN) evaluation.aime --model $(MODEL) --data $(DATA) $(if $(filter $(TINY)/hf,$(MODEL)),$(EVAL_TINY)) $(ARGS)

# What `make plan` plans for.
RECIPE := glm4.7-flash-8gpu
plan: install ## memory, disk, time and money of a run: make plan RECIPE=glm4.7-flash-16gpu ARGS="--gpu H200 --price 3"
	$(RUN) recipe.plan --recipe $(RECIPE) $(ARGS)

# A file's tests share a worker, and what they start; ARGS="-n 0" for none.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
test: install ## run the tests, in as many processes as there are cores
	$(RUN) pytest $(PARALLEL) $(ARGS)

lint: install ## ruff, mypy, shellcheck and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x scripts/*.sh scripts/models/*.sh .ci/run
	$(BIN)/hadolint Dockerfile

.PHONY: docs
docs: install ## regenerate what is generated in README.md and docs/
	@$(BIN)/python scripts/make_docs.py

UV_LOCK := $(BIN)/uv pip compile --quiet --no-config --generate-hashes --no-emit-index-url --no-header $(ARGS)
# torch is installed apart where there may be no GPU.
UV_LOCK_CPU := $(UV_LOCK) --universal --fork-strategy fewest --python-version 3.11 --no-emit-package torch
# The image's platform: Ubuntu 24.04's Python, and a glibc that is new enough for SGLang's wheels.
UV_LOCK_GPU := $(UV_LOCK) --python-version 3.12 --python-platform x86_64-manylinux_2_35 --only-binary :all:

lock: install ## resolve requirements/*.in into requirements/*.lock (pinned versions stay; ARGS=--upgrade renews them)
	$(UV_LOCK_CPU) --excludes requirements/excludes.txt -o requirements/cpu.lock requirements/cpu.in requirements/dev.in >/dev/null
	$(UV_LOCK_CPU) --excludes requirements/excludes.txt -o requirements/bench-trl.lock requirements/bench-trl.in >/dev/null
	$(UV_LOCK_CPU) --excludes requirements/excludes-sglang-cpu.txt -o requirements/sglang-cpu.lock requirements/sglang-cpu.in >/dev/null
	$(UV_LOCK_GPU) --constraints requirements/cpu.lock --overrides requirements/overrides-gpu.txt -o requirements/gpu.lock requirements/cpu.in requirements/gpu.in requirements/dev.in >/dev/null
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
