"""Verdicts: what an evaluation says of a response.

Extraction and equality are training's (`recipe.rewards`), with one difference. Training's `deepscaler` rule demands a
`</think>`, since its prompts open the thinking part. An evaluation also meets models that do not think, so here a
response without any thinking tag is all answer, unless its prompt is known to open the thinking part, or it was cut off
and may have been thinking still.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self

from recipe.rewards import Grade, Grader, GradeRequest, GradeStatus, RewardRule
from recipe.rewards.extract import THINKING_START, Extraction, answer_after_thinking
from recipe.rewards.functions import answer_in_label
from recipe.rewards.plain import MAX_ANSWER_CHARACTERS, canonical_integer

MAX_LABEL = 999
"""AIME's answers are the integers from 0 to this one."""

Extract = Callable[[str], Extraction]

_CORRECT, _WRONG = 1.0, 0.0


class Verdict(StrEnum):
    """What a response is worth. Only `correct` scores."""

    CORRECT = "correct"
    WRONG = "wrong"
    """It has an answer, and that is not the label."""
    NO_ANSWER = "no_answer"
    """It ended by itself and has no answer after its thinking part."""
    TRUNCATED = "truncated"
    """It was cut off before it had one."""
    GRADER_FAILED = "grader_failed"
    """The comparison took too long or too much memory: counted apart, and not correct."""


@dataclass(frozen=True)
class Response:
    """What is to be judged."""

    text: str
    label: str
    truncated: bool = False
    """The engine cut it off."""
    prompt: str | None = None
    """What the model read before it, if that is known."""


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    answer: str | None
    """The content of the box that counts; None if there is none."""
    reason: str
    """Why the verdict is what it is, as half a sentence."""
    value: str | None = None
    """The answer in the form that all its spellings share (`recipe.rewards.Grade.value`): what it votes for."""


def aime_label_problem(label: str) -> str | None:
    """What keeps a label from being an answer of AIME's, as the end of a sentence that begins with the label."""
    integer = canonical_integer(label)
    if integer is None:
        return "is no integer"
    return None if integer in _AIME_ANSWERS else f"is not between 0 and {MAX_LABEL}"


_AIME_ANSWERS = frozenset(map(str, range(MAX_LABEL + 1)))


class Judge:
    """Judges responses by the answer that `extract` finds. What takes algebra goes to `num_workers` processes, started
    when first needed, and fails after `timeout_s` seconds (by default as in `Grader`). Needs no main thread; leaving it
    as a context manager leaves no process behind."""

    def __init__(
        self,
        extract: Extract = answer_after_thinking,
        *,
        timeout_s: float | None = None,
        num_workers: int | None = None,
    ) -> None:
        rule = RewardRule(extract, _CORRECT, _WRONG, aime_label_problem)
        self._grader = Grader(rule, timeout_s=timeout_s, num_workers=num_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._grader.close()

    def judge(self, responses: Sequence[Response]) -> list[Judgement]:
        """The judgement of every response, in their order; blocks while processes compute."""
        grades = self._grader.grade([_request(response) for response in responses])
        return [_judgement(grade, response) for grade, response in zip(grades, responses, strict=True)]

    async def judge_async(self, responses: Sequence[Response]) -> list[Judgement]:
        """As `judge`, without blocking the event loop."""
        grades = await self._grader.grade_async([_request(response) for response in responses])
        return [_judgement(grade, response) for grade, response in zip(grades, responses, strict=True)]


def _request(response: Response) -> GradeRequest:
    """Among responses whose prompt nobody knows, one that was cut off may have been thinking still."""
    unknown = THINKING_START if response.truncated else ""
    prompt = unknown if response.prompt is None else response.prompt
    return GradeRequest(prompt, response.text, response.label, response.truncated)


def _judgement(grade: Grade, response: Response) -> Judgement:
    match grade.status:
        case GradeStatus.GRADED:
            assert grade.answer is not None
            verdict = Verdict.CORRECT if grade.reward == _CORRECT else Verdict.WRONG
            return Judgement(verdict, grade.answer, _comparison(grade.answer, response.label, verdict), grade.value)
        case GradeStatus.NO_ANSWER:
            return Judgement(Verdict.NO_ANSWER, None, grade.reason)
        case GradeStatus.TRUNCATED:
            return Judgement(Verdict.TRUNCATED, None, f"cut off, and {grade.reason}")
        case GradeStatus.GRADER_FAILED | GradeStatus.ENVIRONMENT | GradeStatus.LEFT_OUT:
            return Judgement(Verdict.GRADER_FAILED, grade.answer, grade.reason, grade.value)


def _comparison(answer: str, label: str, verdict: Verdict) -> str:
    label = answer_in_label(label)
    relation = "is" if verdict is Verdict.CORRECT else "is not"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return f"an answer of {len(answer):,} characters {relation} the label {label}"
    return f"{answer} {relation} {label}"
