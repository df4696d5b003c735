#!/bin/bash
# The worked example of docs/custom-generation.md on two CPU cores: warms the tiny model up, then has it learn by GRPO to
# call a calculator. Takes about 5 minutes. Run it where the repository is, after `make install`.
#
#   scripts/train_calculator.sh                 with the calculator: runs/calculator
#   scripts/train_calculator.sh without         the same model and questions without it: runs/calculator-without
set -euo pipefail

python=${PYTHON:-.venv/bin/python}
folder=build/calculator
function=(--custom-generate-function-path recipe.generation.examples.calculator:generate)
name=calculator
if [ "${1-}" = without ]; then
    function=()
    name=calculator-without
    shift
fi

if [ ! -e "$folder/hf/config.json" ]; then
    "$python" -m recipe.weights.tiny --output "$folder/init"
    "$python" -m recipe.generation.examples.calculator --output "$folder"
    "$python" -m recipe.train --recipe tiny-sft --name calculator-sft --hf-checkpoint "$folder/init" \
        --prompt-data "$folder/warmup.jsonl" --save-hf "$folder/hf"
fi
"$python" -m recipe.train --recipe tiny --name "$name" --hf-checkpoint "$folder/hf" --ref-load "$folder/hf" \
    --prompt-data "$folder/train.jsonl" --eval-prompt-data heldout "$folder/heldout.jsonl" --eval-labels any \
    --rollout-max-response-len 34 --n-samples-per-eval-prompt 2 --num-rollout 80 --eval-interval 20 \
    "${function[@]}" "$@"
