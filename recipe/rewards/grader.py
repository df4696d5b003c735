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

from recipe.rewards.functions import CustomReward, Reward, RewardRule, answer_in_label
from recipe.rewards.integers import MAX_ANSWER_CHARACTERS, canonical_integer, equals_integer, read_answer
from recipe.rewards.workers import Outcome, WorkerPool
from recipe.system.errors import UserError
from recipe.system.threads import in_thread

FAILED_REWARD = 0.0

_CACHE_SIZE = 1 << 16
_CUSTOM_AT_ONCE = 32
"""Groups that a custom function grades at the same time."""
_ALGEBRA = "recipe.rewards.algebra:compute"
_EQUAL, _VALUE = "equal", "value"
"""Its questions."""


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
    value: str | None = None
    """The answer in a form that all its spellings share, as far as is known: `25.0` and `\\frac{50}{2}` are `25`."""


Call = tuple[str, ...]
"""A question to algebra, with its texts."""


@dataclass(frozen=True)
class _Question:
    """An answer whose grade depends on algebra."""

    answer: str
    calls: tuple[Call, ...]
    wanted: bool | str
    """What every call must come to for the answer to be right."""
    value: str | None
    """The answer's, if it is wrong; None: what the one call comes to."""


class Grader:
    """Grades by a named rule or a custom function. Plain integers are decided at once; what takes algebra goes to
    `num_workers` processes, started when first needed, and fails after `timeout_s` seconds. Safe to use from several
    threads; `close` leaves no process behind."""

    def __init__(self, reward: Reward, *, timeout_s: float = 5.0, num_workers: int = 2) -> None:
        self._reward = reward
        self._pool = WorkerPool(_ALGEBRA, size=num_workers, timeout_s=timeout_s)
        self._lock = threading.Lock()
        self._custom_turns = threading.Semaphore(_CUSTOM_AT_ONCE)
        self._computed: OrderedDict[Call, bool | str] = OrderedDict()
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
        extraction = rule.extract(request.response)
        if extraction.answer is None:
            status = GradeStatus.TRUNCATED if request.truncated else GradeStatus.NO_ANSWER
            return Grade(rule.wrong, status, None, extraction.problem)
        answer, label = extraction.answer, answer_in_label(request.label)
        integer = canonical_integer(label)
        if answer.strip() == label.strip():
            return _graded(rule, answer, True, integer or answer)
        if len(answer) > MAX_ANSWER_CHARACTERS:
            return _graded(rule, answer, False, answer)
        reading = read_answer(answer)
        if integer is None:
            return _Question(answer, ((_EQUAL, answer, label),), True, reading.value)
        equal = equals_integer(reading, integer)
        if equal is None:
            value = reading.bare if reading.integers or len(reading.expressions) > 1 else None
            return _Question(answer, tuple((_VALUE, text) for text in reading.expressions), integer, value)
        return _graded(rule, answer, equal, reading.value)

    def _submit(self, decided: Sequence[Grade | _Question]) -> dict[Call, Future[Outcome]]:
        calls = dict.fromkeys(call for item in decided if isinstance(item, _Question) for call in item.calls)
        return {call: self._known(call) or self._pool.submit(*call) for call in calls}

    def _settle(self, rule: RewardRule, item: Grade | _Question, outcomes: Mapping[Call, Outcome]) -> Grade:
        if isinstance(item, Grade):
            return item
        found = [outcomes[call] for call in item.calls]
        for call, outcome in zip(item.calls, found, strict=True):
            if outcome.value is None:
                return Grade(FAILED_REWARD, GradeStatus.GRADER_FAILED, item.answer, outcome.failure, item.value)
            self._remember(call, outcome.value)
        equal = all(outcome.value == item.wanted for outcome in found)
        told = found[0].value if equal or item.value is None else item.value
        return _graded(rule, item.answer, equal, told if isinstance(told, str) else item.answer)

    def _known(self, call: Call) -> Future[Outcome] | None:
        """What an earlier call came to."""
        with self._lock:
            if call not in self._computed:
                return None
            self._computed.move_to_end(call)
            known: Future[Outcome] = Future()
            known.set_result(Outcome(self._computed[call]))
            return known

    def _remember(self, call: Call, value: bool | str) -> None:
        with self._lock:
            self._computed[call] = value
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
