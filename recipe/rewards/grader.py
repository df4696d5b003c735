"""Grading responses.

A response whose grading fails stays in its group, so that groups keep their size, as in slime; but it says so in its
status, is counted, and if all grades of a rollout fail the run stops. Where the answer is what the grader failed at
(sympy hung, or took all memory) its reward is a wrong answer's, lest hanging the grader pay; where a custom function
raised it is 0.0.
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

from recipe.rewards.comparing import readings_equal, spelled
from recipe.rewards.extract import THINKING_START, opens_thinking
from recipe.rewards.functions import CustomReward, Reward, RewardRule, answer_in_label, read_label
from recipe.rewards.reading import read
from recipe.rewards.values import Reading
from recipe.rewards.workers import Outcome, WorkerPool
from recipe.system.errors import UserError
from recipe.system.threads import in_thread

FAILED_REWARD = 0.0
"""Of a custom function that raised."""

_CACHE_SIZE = 1 << 16
_CUSTOM_AT_ONCE = 32
"""Groups that a custom function grades at the same time."""
_ALGEBRA = "recipe.rewards.algebra:compare"


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
    """Why there is no answer or the grader failed; empty otherwise."""
    value: str | None = None
    """The answer in a form that all its spellings share, as far as is known: `25.0` and `\\frac{50}{2}` are `25`."""


Call = tuple[Reading, Reading]
"""A question to algebra: an answer and a label."""


@dataclass(frozen=True)
class _Question:
    """An answer whose grade depends on algebra."""

    answer: str
    call: Call


class Grader:
    """Grades by a named rule or a custom function. What is rational is decided at once; what takes algebra goes to
    `num_workers` processes, started when first needed, and fails after `timeout_s` seconds. Safe to use from several
    threads; `close` leaves no process behind."""

    def __init__(self, reward: Reward, *, timeout_s: float = 5.0, num_workers: int = 2) -> None:
        self._reward = reward
        self._pool = WorkerPool(_ALGEBRA, size=num_workers, timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._custom_turns = threading.Semaphore(_CUSTOM_AT_ONCE)
        self._computed: OrderedDict[Call, Outcome] = OrderedDict()
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
            with self._custom_turns:
                return self._counted([_custom_grade(self._reward, request) for request in requests])
        decided = [self._decide(self._reward, request) for request in requests]
        pending = self._submit(decided)
        outcomes = {call: future.result() for call, future in pending.items()}
        return self._counted([self._settle(self._reward, item, outcomes) for item in decided])

    async def grade_async(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """As `grade`, without blocking the event loop. A custom function runs in a thread."""
        if not isinstance(self._reward, RewardRule):
            return await in_thread(self.grade, requests)
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
        thinks = opens_thinking(request.prompt)
        extraction = rule.extract(THINKING_START + request.response if thinks else request.response)
        if extraction.answer is None:
            status = GradeStatus.TRUNCATED if request.truncated else GradeStatus.NO_ANSWER
            return Grade(rule.wrong, status, None, extraction.problem)
        answer = extraction.answer
        reading = read(answer)
        if answer.strip() == answer_in_label(request.label).strip():
            return _graded(rule, answer, True, spelled(reading))
        label = read_label(request.label)
        equal = readings_equal(reading, label)
        return _Question(answer, (reading, label)) if equal is None else _graded(rule, answer, equal, spelled(reading))

    def _submit(self, decided: Sequence[Grade | _Question]) -> dict[Call, Future[Outcome]]:
        calls = dict.fromkeys(item.call for item in decided if isinstance(item, _Question))
        return {call: self._known(call) or self._pool.submit(*call) for call in calls}

    def _settle(self, rule: RewardRule, item: Grade | _Question, outcomes: Mapping[Call, Outcome]) -> Grade:
        if isinstance(item, Grade):
            return item
        outcome = outcomes[item.call]
        self._remember(item.call, outcome)
        told = spelled(item.call[0])
        match outcome.value:
            case (bool(equal), str(value)):
                return _graded(rule, item.answer, equal, value or told)
        return Grade(rule.wrong, GradeStatus.GRADER_FAILED, item.answer, outcome.failure, told)

    def _known(self, call: Call) -> Future[Outcome] | None:
        """What an earlier call came to, failures too."""
        with self._lock:
            if call not in self._computed:
                return None
            self._computed.move_to_end(call)
            known: Future[Outcome] = Future()
            known.set_result(self._computed[call])
            return known

    def _remember(self, call: Call, outcome: Outcome) -> None:
        with self._lock:
            self._computed[call] = outcome
            if len(self._computed) > _CACHE_SIZE:
                self._computed.popitem(last=False)

    def _counted(self, grades: list[Grade]) -> list[Grade]:
        with self._lock:
            for grade in grades:
                self._counts[grade.status] += 1
                if grade.status is GradeStatus.GRADER_FAILED:
                    self._last_failure = grade.reason
        return grades


def _graded(rule: RewardRule, answer: str, equal: bool, value: str) -> Grade:
    return Grade(rule.correct if equal else rule.wrong, GradeStatus.GRADED, answer, "", value)


def _custom_grade(function: CustomReward, request: GradeRequest) -> Grade:
    try:
        reward = float(function(request.prompt, request.response, request.label))
    except Exception as error:
        return Grade(FAILED_REWARD, GradeStatus.GRADER_FAILED, None, f"{type(error).__name__}: {error}")
    if not math.isfinite(reward):
        return Grade(FAILED_REWARD, GradeStatus.GRADER_FAILED, None, f"the reward is {reward}")
    return Grade(reward, GradeStatus.GRADED, None, "")
