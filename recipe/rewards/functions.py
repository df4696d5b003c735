"""The named reward functions (`--rm-type`) and custom ones (`--custom-rm-path`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from recipe.rewards.extract import Extraction, boxed_after_thinking, boxed_answer, dapo_answer
from recipe.rewards.integers import canonical_integer
from recipe.system.imports import load_function


class RewardType(StrEnum):
    DEEPSCALER = "deepscaler"
    """The last box after `</think>`, 1 or 0; a response without `</think>` has no answer."""
    MATH = "math"
    """The last box anywhere, 1 or 0."""
    DAPO = "dapo"
    """The last "Answer:" line or box in the last 300 characters, +1 or -1 (DAPO: arXiv:2503.14476, section 2.4)."""


@dataclass(frozen=True)
class RewardRule:
    """Rewards by whether the extracted answer equals the label."""

    extract: Callable[[str], Extraction]
    correct: float
    wrong: float
    """Also of a response without an answer."""
    label_problem: Callable[[str], str | None]
    """What keeps a label from being an answer, as the end of a sentence that begins with the label; None if nothing."""


CustomReward = Callable[[str, str, str], float]
"""fn(prompt, response, label), the prompt as the model read it. It runs in this process, without a time limit."""

Reward = RewardRule | CustomReward


def answer_in_label(label: str) -> str:
    """The answer that a label holds: what it boxes if it boxes something, else all of it."""
    return boxed_answer(label).answer or label.strip()


def _unanswerable(label: str) -> str | None:
    if any(character.isalnum() for character in answer_in_label(label)):
        return None
    return "has neither a digit nor a letter"


def _no_integer(label: str) -> str | None:
    return None if canonical_integer(answer_in_label(label)) is not None else "is no integer, as --rm-type dapo needs"


REWARD_RULES: Mapping[RewardType, RewardRule] = {
    RewardType.DEEPSCALER: RewardRule(boxed_after_thinking, 1.0, 0.0, _unanswerable),
    RewardType.MATH: RewardRule(boxed_answer, 1.0, 0.0, _unanswerable),
    RewardType.DAPO: RewardRule(dapo_answer, 1.0, -1.0, _no_integer),
}


def load_custom_reward(path: str) -> CustomReward:
    """The function that "module:function" names. Raises UserError if there is no such function."""
    return load_function("--custom-rm-path", path)
