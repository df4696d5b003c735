#!/usr/bin/env bash
# From a blank rented node of 8 H100s (Docker, NVIDIA's container toolkit and a driver of 580 or newer are there; 1 TB of
# host memory, 1.5 TB of disk) to a trained, exported and scored model. Run again, it goes on where it was cut off.
#
#   BASE_DIR=/data ROLLOUTS=100 [RECIPE=glm4.7-flash-8gpu-fast] scripts/8xh100.sh
#   DRY_RUN=1 scripts/8xh100.sh                                     prints the commands and runs none
#
# Time and money are planned or reckoned, not measured, at $20 an hour for the node: docs/gpu-node.md says how.
set -euo pipefail
cd "$(dirname "$0")/.."
BASE_DIR=${BASE_DIR:-/data} ROLLOUTS=${ROLLOUTS:-100} PRICE=${PRICE:-2.5}
NAME=${RECIPE:-glm4.7-flash-8gpu}

run() {
    printf '+'
    printf ' %q' "$@"
    echo
    [ -n "${DRY_RUN:-}" ] || "$@"
}
is_there() { [ -z "${DRY_RUN:-}" ] && [ -e "$1" ]; }

# 1. The host's environment (0.6 GB) and the image (25 GB): about 10 minutes, $3. No GPU is needed.
run make install
run make image

# 2. Is this node good? The whole loop on a small model: about 9 minutes, $3. If not, this ends here: give it back.
run make smoke BASE_DIR="$BASE_DIR" PRICE="$PRICE"

# 3. Model and data sets, 60 GB: about 10 minutes at 100 MB/s, $3. No GPU is needed.
run make download BASE_DIR="$BASE_DIR"

# 4. The model in the form that training starts from, 60 GB more: about 3 minutes on an NVMe disk, $1. No GPU is needed.
is_there "$BASE_DIR/GLM-4.7-Flash_torch_dist" || run make convert BASE_DIR="$BASE_DIR"

# 5. Does the run fit, and what does it cost? Seconds; the status is not 0 if it does not fit.
run make plan RECIPE="$NAME" ARGS="--gpu H100-80GB --host-memory 1TB --price $PRICE --num-rollout $ROLLOUTS"

# 6. GRPO, from the run's newest checkpoint if there is one: 100 steps take 7 to 14 hours and $140 to $270, all 3,000
# take 200 to 400 hours and $4,100 to $8,000; with RECIPE=glm4.7-flash-8gpu-fast about half, by the plan.
run make train-8gpu BASE_DIR="$BASE_DIR" ARGS="--recipe $NAME --num-rollout $ROLLOUTS --load runs/$NAME/checkpoints"

# 7. What it achieved, and where its time went: seconds.
run make report NAME="$NAME"

# 8. The newest checkpoint for transformers and SGLang, 60 GB: about 3 minutes, $1. No GPU is needed.
is_there "runs/$NAME/hf" || run make export BASE_DIR="$BASE_DIR" NAME="$NAME"

# 9. AIME 2024 in the image on all 8 GPUs: 30 problems, 16 samples each; roughly 10 minutes to an hour, $3 to $20.
score="make eval MODEL=runs/$NAME/hf DATA=${BASE_DIR@Q}/aime-2024/aime-2024.jsonl"
run .venv/bin/invoke shell --base-dir "$BASE_DIR" --command "$score ARGS='--engine-args \"--tp-size 4 --dp-size 2\"'"
