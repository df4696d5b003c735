"""The named reward functions (`--rm-type`) and custom ones (`--custom-rm-path`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from recipe.rewards.comparing import values_differ
from recipe.rewards.exact import TooLarge, rational
from recipe.rewards.extract import (
    Extraction,
    answer_after_thinking,
    answer_line_after_thinking,
    boxed_after_thinking,
    boxed_answer,
    count_boxes,
)
from recipe.rewards.reading import read
from recipe.rewards.values import Number, Reading


class RewardType(StrEnum):
    DEEPSCALER = "deepscaler"
    """The last box after `</think>`, 1 or 0; a response without `</think>` has no answer."""
    MATH = "math"
    """The last box, 1 or 0; a box inside thinking is none."""
    DAPO = "dapo"
    """The last "Answer:" line or box in the last 300 characters after thinking, +1 or -1 (DAPO: arXiv:2503.14476,
    section 2.4)."""


@dataclass(frozen=True)
class RewardRule:
    """Rewards by whether the extracted answer equals the label."""

    extract: Callable[[str], Extraction]
    correct: float
    wrong: float
    """Also of a response without an answer, and of one whose answer makes the grader fail."""
    label_problem: Callable[[str], str | None]
    """What keeps a label from being an answer, as the end of a sentence that begins with the label; None if nothing."""


@dataclass(frozen=True)
class CustomReward:
    """A function of the user's, fn(prompt, response, label), the prompt as the model read it. It returns a number, of
    Python's, numpy's or torch's, or is a coroutine that does. It is called in processes that can be ended
    (`recipe.rewards.serve`)."""

    path: str
    """module:function"""
    sees_group: bool = False
    """It is fn(prompt, responses, label) with all responses to a prompt, and returns a number for each."""


Reward = RewardRule | CustomReward


def answer_in_label(label: str) -> str:
    """The answer that a label holds: what it boxes if it boxes one thing, else all of it."""
    boxed = boxed_answer(label).answer if count_boxes(label) == 1 else None
    return boxed or label.strip()


def read_label(label: str) -> Reading:
    """What a label says; its `problem` says what keeps it from being an answer, as the end of a sentence that begins
    with the label."""
    answer = answer_in_label(label)
    if any("\ud800" <= character <= "\udfff" for character in label):
        return Reading(answer, problem="holds half of a character, a lone surrogate")
    if answer.strip("+- ").casefold() in _NO_NUMBERS:
        return Reading(answer, problem="is not a number")
    if not any(character.isalnum() for character in answer):
        return Reading(answer, problem="has neither a digit nor a letter")
    reading = read(answer)
    if values_differ(reading.values):
        return Reading(answer, problem="is an equation of values that differ")
    return reading


_NO_NUMBERS = frozenset({"nan", "inf", "infinity"})
"""How JSON's NaN and Infinity arrive."""


def _unreadable(label: str) -> str | None:
    return read_label(label).problem or None


def _no_integer(label: str) -> str | None:
    reading = read_label(label)
    return reading.problem or (None if _is_integer(reading) else "is no integer, as --rm-type dapo needs")


def _is_integer(reading: Reading) -> bool:
    match reading.values:
        case (Number(tree), *_):
            try:
                value = rational(tree)
            except TooLarge:
                return False
            return value is not None and value.denominator == 1
    return False


REWARD_RULES: Mapping[RewardType, RewardRule] = {
    RewardType.DEEPSCALER: RewardRule(boxed_after_thinking, 1.0, 0.0, _unreadable),
    RewardType.MATH: RewardRule(answer_after_thinking, 1.0, 0.0, _unreadable),
    RewardType.DAPO: RewardRule(answer_line_after_thinking, 1.0, -1.0, _no_integer),
}
