"""A calculator for the model: `<tool_call>37*48</tool_call>` is answered by `<tool_response>1776</tool_response>`.

--custom-generate-function-path recipe.generation.examples.calculator:generate   the function
python -m recipe.generation.examples.calculator --output DIR --seed N            a task for it, of the tiny model's size

The task is products of two numbers of two digits, which the tiny model cannot work out by itself. Its warm-up is by a
teacher who mostly gives up, and calls the calculator now and then: reinforcement learning has to find out that calling
it pays.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from recipe.generation.turns import GenerateSettings, TurnEngine
from recipe.sampling.sample import Sample
from recipe.system.errors import run_main
from recipe.system.files import atomic_write_text
from recipe.system.seeds import derive

END = "</tool_call>"
CALL = re.compile(r"<tool_call>(\d{1,9})([-+*])(\d{1,9})$")
CALLING_SHARE = 0.4
"""Share of the warm-up's responses that call the calculator."""
HELDOUT = 200


async def generate(sample: Sample, engine: TurnEngine, settings: GenerateSettings) -> None:
    """Turns of the model until one ends without a call."""
    while (turn := await engine.generate(stop=(END,))).matched == END:
        sample.append_environment(settings.encode(answer(turn.text)))


def answer(text: str) -> str:
    """What the calculator says to a turn that ends in a call."""
    call = CALL.search(text)
    return f"<tool_response>{'error' if call is None else calculated(*call.groups())}</tool_response>"


def calculated(left: str, sign: str, right: str) -> int:
    """The value of a sum, difference or product."""
    match sign:
        case "+":
            return int(left) + int(right)
        case "-":
            return int(left) - int(right)
        case _:
            return int(left) * int(right)


@dataclass(frozen=True)
class Product:
    """A question of the task."""

    left: int
    right: int

    def line(self) -> dict[str, object]:
        """Its line in a prompt file."""
        content = f"{self.left}*{self.right}="
        return {"prompt": [{"role": "user", "content": content}], "label": str(self.left * self.right)}

    def response(self, *, calls: bool) -> str:
        """The finished response, all of its turns."""
        call = f"<tool_call>{self.left}*{self.right}"
        told = f"{call}{END}{answer(call)}\\boxed{{{self.left * self.right}}}"
        return f"</think>{told}" if calls else "</think>\\boxed{0}"


def task(seed: int) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """The files of the task, by name; no held-out question is another's with its factors reordered."""
    draw = random.Random(derive(seed, "calculator"))
    products = [Product(left, right) for left, right in product(range(10, 100), repeat=2) if left <= right]
    draw.shuffle(products)
    held, train = products[:HELDOUT], products[HELDOUT:]
    train += [Product(item.right, item.left) for item in train if item.left != item.right]
    draw.shuffle(train)
    yield "train.jsonl", [item.line() for item in train]
    yield "heldout.jsonl", [item.line() for item in held]
    answered = [(item, item.response(calls=draw.random() < CALLING_SHARE)) for item in 4 * train]
    yield "warmup.jsonl", [item.line() | {"response": response} for item, response in answered]


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the task for the calculator.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the three files")
    parser.add_argument("--seed", type=int, default=1234)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, lines in task(arguments.seed):
        atomic_write_text(arguments.output / name, "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    run_main(main)
