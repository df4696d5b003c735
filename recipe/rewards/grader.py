"""Grading responses.

A response whose grading fails (math-verify hung or raised, a custom function raised) gets reward 0.0 and stays in its
group, so that groups keep their size, as in slime; but it says so in its status, is counted, and if all grades of a
rollout fail the run stops.
"""

import asyncio
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from recipe.errors import UserError
from recipe.rewards.equality import plainly_equal
from recipe.rewards.functions import CustomReward, Reward, RewardRule, answer_in_label
from recipe.rewards.workers import Outcome, WorkerPool

FAILED_REWARD = 0.0

_CACHE_SIZE = 1 << 16
_EQUALITY = "recipe.rewards.algebra:algebraically_equal"


class GradeStatus(StrEnum):
    GRADED = "graded"
    """Right or wrong by the reward's own measure."""
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    """No answer, because the response was cut off."""
    GRADER_FAILED = "grader_failed"


@dataclass(frozen=True)
class GradeRequest:
    prompt: str
    response: str
    label: str
    truncated: bool = False


@dataclass(frozen=True)
class Grade:
    reward: float
    status: GradeStatus
    answer: str | None
    """What was taken for the answer; None if none was found, or if the reward function is a custom one."""
    reason: str
    """Why there is no answer or no grade; empty otherwise."""


@dataclass(frozen=True)
class _Question:
    answer: str
    label: str


class Grader:
    """Grades by a named rule or a custom function. Plain integers are decided at once; what takes algebra goes to
    `num_workers` processes, started when first needed, and fails after `timeout_s` seconds. Safe to use from several
    threads; `close` leaves no process behind."""

    def __init__(self, reward: Reward, *, timeout_s: float = 5.0, num_workers: int = 2) -> None:
        self._reward = reward
        self._pool = WorkerPool(_EQUALITY, size=num_workers, timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._equal: OrderedDict[_Question, bool] = OrderedDict()
        self._counts: Counter[GradeStatus] = Counter()
        self._last_failure = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """The grade of every request, in their order; blocks while processes compute."""
        if not isinstance(self._reward, RewardRule):
            return self._counted([_custom_grade(self._reward, request) for request in requests])
        decided = [self._decide(self._reward, request) for request in requests]
        pending = self._submit(decided)
        outcomes = {question: future.result() for question, future in pending.items()}
        return self._counted([self._settle(self._reward, item, outcomes) for item in decided])

    async def grade_async(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """As `grade`, without blocking the event loop. A custom function runs in a thread."""
        if not isinstance(self._reward, RewardRule):
            return await asyncio.to_thread(self.grade, requests)
        decided = [self._decide(self._reward, request) for request in requests]
        pending = self._submit(decided)
        values = await asyncio.gather(*map(asyncio.wrap_future, pending.values()))
        outcomes = dict(zip(pending, values, strict=True))
        return self._counted([self._settle(self._reward, item, outcomes) for item in decided])

    def collect_counts(self) -> Mapping[GradeStatus, int]:
        """How many grades had each status since the last call (a rollout's, if called after each).

        Raises UserError if there were grades and every single one failed: training on them would teach nothing.
        """
        with self._lock:
            counts, self._counts = self._counts, Counter()
        if counts[GradeStatus.GRADER_FAILED] and counts.total() == counts[GradeStatus.GRADER_FAILED]:
            raise UserError(f"none of {counts.total()} responses could be graded, the last one: {self._last_failure}")
        return {status: counts[status] for status in GradeStatus}

    def _decide(self, rule: RewardRule, request: GradeRequest) -> Grade | _Question:
        """The grade, or the question on which it depends."""
        extraction = rule.extract(request.response)
        if extraction.answer is None:
            status = GradeStatus.TRUNCATED if request.truncated else GradeStatus.NO_ANSWER
            return Grade(rule.wrong, status, None, extraction.problem)
        question = _Question(extraction.answer, answer_in_label(request.label))
        equal = plainly_equal(question.answer, question.label)
        if equal is None:
            equal = self._known(question)
        return question if equal is None else _graded(rule, question, equal)

    def _submit(self, decided: Sequence[Grade | _Question]) -> dict[_Question, Future[Outcome]]:
        questions = dict.fromkeys(item for item in decided if isinstance(item, _Question))
        return {question: self._pool.submit(question.answer, question.label) for question in questions}

    def _settle(self, rule: RewardRule, item: Grade | _Question, outcomes: Mapping[_Question, Outcome]) -> Grade:
        if isinstance(item, Grade):
            return item
        outcome = outcomes[item]
        if outcome.value is None:
            return Grade(FAILED_REWARD, GradeStatus.GRADER_FAILED, item.answer, outcome.failure)
        self._remember(item, outcome.value)
        return _graded(rule, item, outcome.value)

    def _known(self, question: _Question) -> bool | None:
        with self._lock:
            if question in self._equal:
                self._equal.move_to_end(question)
            return self._equal.get(question)

    def _remember(self, question: _Question, equal: bool) -> None:
        with self._lock:
            self._equal[question] = equal
            if len(self._equal) > _CACHE_SIZE:
                self._equal.popitem(last=False)

    def _counted(self, grades: list[Grade]) -> list[Grade]:
        with self._lock:
            for grade in grades:
                self._counts[grade.status] += 1
                if grade.status is GradeStatus.GRADER_FAILED:
                    self._last_failure = grade.reason
        return grades


def _graded(rule: RewardRule, question: _Question, equal: bool) -> Grade:
    return Grade(rule.correct if equal else rule.wrong, GradeStatus.GRADED, question.answer, "")


def _custom_grade(function: CustomReward, request: GradeRequest) -> Grade:
    try:
        reward = float(function(request.prompt, request.response, request.label))
    except Exception as error:
        return Grade(FAILED_REWARD, GradeStatus.GRADER_FAILED, None, f"{type(error).__name__}: {error}")
    if not math.isfinite(reward):
        return Grade(FAILED_REWARD, GradeStatus.GRADER_FAILED, None, f"the reward is {reward}")
    return Grade(reward, GradeStatus.GRADED, None, "")
