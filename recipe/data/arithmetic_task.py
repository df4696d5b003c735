"""The built-in task: sums of three integers, in the format of dapo-math-17k.

Usage: python -m recipe.data.arithmetic_task --output DIR --seed N [--max-operand 9] [--heldout 200]

Writes train.jsonl, heldout.jsonl and warmup.jsonl. Every line has `prompt` (messages) and `label`. Training and
held-out questions share no sum, not even with its operands reordered. A line of warmup.jsonl also has `response`, the
finished turn for the supervised warm-up: the training questions, answered by a teacher who adds well but mostly forgets
to box the answer. So reinforcement learning finds a model that knows something, and must learn what is asked of it.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations
from pathlib import Path

from recipe.system.errors import UserError, run_main
from recipe.system.files import atomic_write_text
from recipe.system.seeds import derive

OPERANDS = 3
WARMUP_RESPONSES = 4
"""Responses to each training question in warmup.jsonl."""
UNBOXED_SHARE = 0.6
"""Share of them that lack the box."""


@dataclass(frozen=True)
class Sum:
    operands: tuple[int, ...]

    @property
    def question(self) -> str:
        return "+".join(map(str, self.operands)) + "="

    @property
    def answer(self) -> str:
        return str(sum(self.operands))

    def response(self, *, boxed: bool) -> str:
        """The finished turn that answers the question."""
        return f"</think>\\boxed{{{self.answer}}}" if boxed else f"</think>{self.answer}"


def split_sums(
    seed: int, max_operand: int, heldout: int, *, keep_orders_together: bool = True
) -> tuple[list[Sum], list[Sum]]:
    """All sums of OPERANDS operands from 0 to `max_operand`, each once, in a random order: for training, and at most
    `heldout` (as many as whole sets of reorderings allow) held out; where orders are not kept together exactly so many,
    most of which are reorderings of training's. Raises UserError if that would leave none for training."""
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
        if not keep_orders_together:
            train += orders
            continue
        (held if len(held) + len(orders) <= heldout else train).extend(orders)
    draw.shuffle(train)
    draw.shuffle(held)
    return (train, held) if keep_orders_together else (train[heldout:], train[:heldout])


def write_task(output: Path, seed: int, max_operand: int, heldout: int, *, keep_orders_together: bool = True) -> None:
    """Writes the three files into `output`, the same bytes for the same arguments."""
    train, held = split_sums(seed, max_operand, heldout, keep_orders_together=keep_orders_together)
    output.mkdir(parents=True, exist_ok=True)
    _write_lines(output / "train.jsonl", [_line(item) for item in train])
    _write_lines(output / "heldout.jsonl", [_line(item) for item in held])
    draw = random.Random(derive(seed, "arithmetic", "warmup"))
    answered = [
        _line(item) | {"response": item.response(boxed=draw.random() >= UNBOXED_SHARE)}
        for item in WARMUP_RESPONSES * train
    ]
    _write_lines(output / "warmup.jsonl", answered)


def _line(item: Sum) -> dict[str, object]:
    return {"prompt": [{"role": "user", "content": item.question}], "label": item.answer}


def _write_lines(path: Path, lines: Sequence[dict[str, object]]) -> None:
    atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the built-in arithmetic task.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the three files")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--max-operand", type=int, default=9)
    parser.add_argument("--heldout", type=int, default=200, help="number of sums that are held out")
    arguments = parser.parse_args()
    write_task(arguments.output, arguments.seed, arguments.max_operand, arguments.heldout)


if __name__ == "__main__":
    run_main(main)
