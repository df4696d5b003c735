"""The built-in task: sums of three integers, in the format of dapo-math-17k.

Usage: python -m recipe.data.arithmetic --output DIR --seed N [--max-operand 9] [--heldout 200]

Writes train.jsonl and heldout.jsonl. Every line has `prompt` (messages) and `label`; a line of train.jsonl also has
`response`, the finished turn for the supervised warm-up. The two share no sum, not even with its operands reordered.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations
from pathlib import Path

from recipe.errors import UserError, run_main
from recipe.files import atomic_write_text
from recipe.seeds import derive

OPERANDS = 3


@dataclass(frozen=True)
class Sum:
    operands: tuple[int, ...]

    @property
    def question(self) -> str:
        return "+".join(map(str, self.operands)) + "="

    @property
    def answer(self) -> str:
        return str(sum(self.operands))

    @property
    def response(self) -> str:
        return f"</think>\\boxed{{{self.answer}}}"


def split_sums(seed: int, max_operand: int, heldout: int) -> tuple[list[Sum], list[Sum]]:
    """All sums of OPERANDS operands from 0 to `max_operand`, each once, in a random order: for training, and at most
    `heldout` (as many as whole sets of reorderings allow) held out. Raises UserError if that would leave none for
    training."""
    total = (max_operand + 1) ** OPERANDS
    if not 0 < heldout < total:
        raise UserError(
            f"--heldout {heldout} is not between 1 and {total - 1}: there are {total} sums up to {max_operand}"
        )
    draw = random.Random(derive(seed, "arithmetic"))
    combinations = list(combinations_with_replacement(range(max_operand + 1), OPERANDS))
    draw.shuffle(combinations)
    train: list[Sum] = []
    held: list[Sum] = []
    for combination in combinations:
        orders = [Sum(order) for order in dict.fromkeys(permutations(combination))]
        (held if len(held) + len(orders) <= heldout else train).extend(orders)
    draw.shuffle(train)
    draw.shuffle(held)
    return train, held


def write_task(output: Path, seed: int, max_operand: int, heldout: int) -> None:
    """Writes train.jsonl and heldout.jsonl into `output`, the same bytes for the same arguments."""
    train, held = split_sums(seed, max_operand, heldout)
    output.mkdir(parents=True, exist_ok=True)
    _write_lines(output / "train.jsonl", [_line(item) | {"response": item.response} for item in train])
    _write_lines(output / "heldout.jsonl", [_line(item) for item in held])


def _line(item: Sum) -> dict[str, object]:
    return {"prompt": [{"role": "user", "content": item.question}], "label": item.answer}


def _write_lines(path: Path, lines: Sequence[dict[str, object]]) -> None:
    atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the built-in arithmetic task.")
    parser.add_argument("--output", type=Path, required=True, help="directory for train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--max-operand", type=int, default=9)
    parser.add_argument("--heldout", type=int, default=200, help="number of sums that are held out")
    arguments = parser.parse_args()
    write_task(arguments.output, arguments.seed, arguments.max_operand, arguments.heldout)


if __name__ == "__main__":
    run_main(main)
