"""The conformance suite, a busy machine, and hostile responses."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluation.grading import Response

CONFORMANCE = Path(__file__).parent / "conformance.jsonl"

HOSTILE_LABEL = "733"
"""No sum, product or list of what `hostile_responses` writes: its digits are 0, 1, 2 and 9 alone."""

_Writer = Callable[[random.Random], str]


def _characters(draw: random.Random) -> str:
    kinds = [range(32, 127), range(0x80, 0x3000), range(0x3000, 0xD800), range(0xE000, 0x110000)]
    return "".join(chr(draw.choice(draw.choice(kinds))) for _ in range(40))


_NESTED: tuple[_Writer, ...] = (
    lambda draw: r"\frac{" * (depth := draw.randrange(1, 60)) + "1" + "}{2}" * depth,
    lambda draw: r"\sqrt{" * (depth := draw.randrange(1, 60)) + "2" + "}" * depth,
    lambda draw: "(" * (depth := draw.randrange(1, 300)) + "1" + ")" * depth,
    lambda draw: r"\left(" * (depth := draw.randrange(1, 60)) + "x" + r"\right)" * depth,
)
_ANSWERS: tuple[_Writer, ...] = (
    _characters,
    lambda draw: "{" * draw.randrange(500) + "12" + "}" * draw.randrange(500),
    lambda draw: "".join(draw.choices(r"\{}[]()^_$&%#~+-*/=<>|,.;:!? 0129abxyz", k=draw.randrange(1, 400))),
    lambda draw: "".join(
        draw.choices([r"\text{", r"\left(", "}", r"\right)", "12", r"\boxed{", r"\cdot ", "^{", "_", "="], k=30)
    ),
    lambda draw: "+".join(draw.choices(["1", "2", "x", r"\pi", r"\frac12", r"\infty", "i"], k=draw.randrange(1, 100))),
    lambda draw: draw.choice(["\0", "\u200b", "\u202e", "\ufeff", "\u0301"]) * draw.randrange(1, 200) + "12",
    lambda draw: "9" * draw.randrange(1, 5000),
    lambda draw: draw.choice(["eval('12')", "__import__('os').abort()", "<script>alert(12)</script>", "%s%s%n"]),
)
_POWERS = (
    "9^{9^{9^{9}}}",
    "2^{2^{2^{2^{2^{2}}}}}",
    "(99999!)!",
    "(10^{100})!",
    "9^{999999999}",
    r"\binom{10^{9}}{10^{8}}",
)
_HUGE = (
    "\\boxed{",
    "{",
    "}",
    "\\",
    "9",
    "<think>",
    "</think>",
    "\\boxed{12}",
    "\U0001d7cf",
    "\\boxed{1+",
    "\n",
    "\u202e",
)


def conformance_cases() -> list[dict[str, Any]]:
    """`response`, `label`, perhaps `finish_reason` and `prompt`; `verdict`, and `why` that is the right one."""
    return [json.loads(line) for line in CONFORMANCE.read_text(encoding="utf-8").split("\n") if line]


def as_response(case: dict[str, Any]) -> Response:
    return Response(case["response"], str(case["label"]), case.get("finish_reason") == "length", case.get("prompt"))


def hostile_responses(count: int) -> list[str]:
    """None of them answers HOSTILE_LABEL; a dozen have a megabyte."""
    draw = random.Random(5)
    huge = [unit * (1_000_000 // len(unit)) + f"</think>\\boxed{{{unit}" for unit in _HUGE]
    nested = [draw.choice(_NESTED)(draw) for _ in range(24)]
    others = [draw.choice(_ANSWERS)(draw) for _ in range(count - len(huge) - len(nested) - len(_POWERS))]
    return [*huge, *(f"</think>\\boxed{{{answer}}}" for answer in [*_POWERS, *nested, *others])]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that want a core each, all the time."""
    spinners = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
