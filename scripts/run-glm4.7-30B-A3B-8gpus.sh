#!/usr/bin/env bash
# Trains GLM-4.7-Flash on this machine's 8 GPUs, as a job of a Ray of its own, which ends with it. BASE_DIR holds
# GLM-4.7-Flash/, GLM-4.7-Flash_torch_dist/, dapo-math-17k/ and aime-2024/ (default: /root). Flags go to recipe.train:
#
#   BASE_DIR=/data scripts/run-glm4.7-30B-A3B-8gpus.sh [--recipe glm4.7-flash-8gpu-mtp] [--num-rollout 100] ...
#
# Exit status: the run's; 75 when a SIGTERM ended it saved, 76 when a limit of its own did (--max-dollars and others).
set -euo pipefail
BASE_DIR=$(realpath -- "${BASE_DIR:-/root}")
export BASE_DIR
cd "$(dirname "$0")/.."
# shellcheck source=scripts/models/glm4.7-30B-A3B.sh
source scripts/models/glm4.7-30B-A3B.sh

DATA_ARGS=(
    --hf-checkpoint "$BASE_DIR/GLM-4.7-Flash"
    --ref-load "$BASE_DIR/GLM-4.7-Flash_torch_dist"
    --prompt-data "$BASE_DIR/dapo-math-17k/dapo-math-17k.jsonl"
    --eval-prompt-data aime "$BASE_DIR/aime-2024/aime-2024.jsonl"
)

exec "${PYTHON:-python3}" -m recipe.cluster.launch --recipe glm4.7-flash-8gpu "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "$@"
