"""How mistakes in a configuration are told."""

import difflib
from collections.abc import Iterable, Sequence

from recipe.system.errors import UserError


def refuse(problems: Sequence[str]) -> None:
    """Raises one UserError that lists all problems; returns if there is none."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError(f"{len(problems)} problems:" + "".join(f"\n  - {problem}" for problem in problems))


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: its nearest match, if any is near."""
    matches = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def plainly(message: str) -> str:
    """pydantic's message as the end of a sentence."""
    return message.removeprefix("Value error, ").replace("Input should", "it should", 1)


def listed(items: Iterable[object]) -> str:
    """'a, b or c'."""
    *rest, last = map(str, items)
    return f"{', '.join(rest)} or {last}" if rest else last


def nearest(number: int, allowed: Iterable[int]) -> str:
    """The largest of `allowed` below a number, and the smallest above it, as 'a or b'; nothing where there is none."""
    values = sorted(allowed)
    below, above = [v for v in values if v < number], [v for v in values if v > number]
    return listed([*below[-1:], *above[:1]]) if below or above else ""
