#!/usr/bin/env bash
# Trains GLM-4.7-Flash on several nodes of 8 GPUs. Run it on the first one; on each other node run, with the same
# BASE_DIR and MASTER_ADDR, `make join` (python -m recipe.cluster.join).
#
#   BASE_DIR     storage that all nodes share; holds GLM-4.7-Flash/, GLM-4.7-Flash_torch_dist/, dapo-math-17k/ and
#                aime-2024/, and gets the runs
#   MASTER_ADDR  an address of this machine that all nodes reach
#
#   BASE_DIR=/shared MASTER_ADDR=10.0.0.1 scripts/run-glm4.7-30B-A3B.sh [--recipe glm4.7-flash-24gpu] [flags] ...
#
# Exit status: the run's; 75 when a SIGTERM, here or on another node, ended it saved, 76 when a limit of its own
# did (--max-dollars and others).
set -euo pipefail
: "${BASE_DIR:?is not set: storage that all nodes share}" "${MASTER_ADDR:?is not set: an address of this machine that all nodes reach}"
BASE_DIR=$(realpath -- "$BASE_DIR")
export BASE_DIR MASTER_ADDR
cd "$(dirname "$0")/.."
# shellcheck source=scripts/models/glm4.7-30B-A3B.sh
source scripts/models/glm4.7-30B-A3B.sh

CLUSTER_ARGS=(--master-addr "$MASTER_ADDR" --runs-dir "$BASE_DIR/runs")
DATA_ARGS=(
    --hf-checkpoint "$BASE_DIR/GLM-4.7-Flash"
    --ref-load "$BASE_DIR/GLM-4.7-Flash_torch_dist"
    --prompt-data "$BASE_DIR/dapo-math-17k/dapo-math-17k.jsonl"
    --eval-prompt-data aime "$BASE_DIR/aime-2024/aime-2024.jsonl"
)

exec "${PYTHON:-python3}" -m recipe.cluster.launch --recipe glm4.7-flash-16gpu \
    "${MODEL_ARGS[@]}" "${CLUSTER_ARGS[@]}" "${DATA_ARGS[@]}" "$@"
