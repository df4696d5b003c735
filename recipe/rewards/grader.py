"""Grading responses.

A response whose grading fails stays in its group, so that groups keep their size, as in slime; but it says so in its
status, is counted, and if all grades of a rollout fail the run stops. Where the answer is what the grader failed at
(sympy hung, or took all memory) its reward is a wrong answer's, lest hanging the grader pay; where a custom function
failed it is 0.0.
"""

import asyncio
import math
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from recipe.rewards.comparing import readings_equal, spelled
from recipe.rewards.extract import THINKING_START, opens_thinking
from recipe.rewards.functions import (
    REWARD_RULES,
    CustomReward,
    Reward,
    RewardRule,
    RewardType,
    answer_in_label,
    read_label,
)
from recipe.rewards.reading import read
from recipe.rewards.values import Reading
from recipe.rewards.workers import Outcome, Worker, WorkerPool
from recipe.system.errors import UserError

FAILED_REWARD = 0.0
"""Reward where a custom function raised, hung, left, or returned no number."""
CUSTOM_FLAG = "--custom-rm-path"
TIMEOUT_S, CUSTOM_TIMEOUT_S = 5.0, 60.0
"""Longest time to grade a response, if nothing else is said: algebra is over in a moment, and a custom function may ask
a judge."""
NUM_WORKERS, MOST_CUSTOM_WORKERS = 2, 32

_CACHE_SIZE = 1 << 16
_ALGEBRA = "recipe.rewards.algebra:compare"


class GradeStatus(StrEnum):
    GRADED = "graded"
    """Right or wrong by the reward's own measure."""
    NO_ANSWER = "no_answer"
    TRUNCATED = "truncated"
    """No answer, because the response was cut off."""
    GRADER_FAILED = "grader_failed"
    ENVIRONMENT = "environment"
    """The custom generate function has given the reward."""
    LEFT_OUT = "left_out"
    """Nothing was graded, and nothing is learned from it."""


@dataclass(frozen=True)
class GradeRequest:
    prompt: str
    response: str
    label: str
    truncated: bool = False
    rm_type: RewardType | None = None
    """A named rule for this response, in place of the grader's; a custom function grades all."""


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
    """Grades by a named rule, of which a request may name another, or by a custom function. What is rational is decided
    at once; what takes algebra, and every call of a custom function, goes to `num_workers` processes, started when
    needed, and fails after `timeout_s` seconds. Safe to use from several threads; `close` leaves no process behind."""

    def __init__(self, reward: Reward, *, timeout_s: float | None = None, num_workers: int | None = None) -> None:
        self._reward = reward
        if isinstance(reward, RewardRule):
            size, limit_s = num_workers or NUM_WORKERS, timeout_s or TIMEOUT_S
            self._pool = WorkerPool(_ALGEBRA, size=size, timeout_s=limit_s)
        else:
            size, limit_s = num_workers or min(MOST_CUSTOM_WORKERS, os.cpu_count() or 1), timeout_s or CUSTOM_TIMEOUT_S
            self._pool = WorkerPool(reward.path, size=size, timeout_s=limit_s, flag=CUSTOM_FLAG)
        self._first = min(size, NUM_WORKERS)
        self._lock = threading.Lock()
        self._computed: OrderedDict[Call, Outcome] = OrderedDict()
        self._counts: Counter[GradeStatus] = Counter()
        self._last_failure = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the first processes, which takes seconds, beside whatever goes on."""
        self._pool.start(self._first)

    def close(self) -> None:
        self._pool.close()

    def grade(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """The grade of every request, in their order; blocks while processes compute. To a custom function that sees
        groups, the requests are one."""
        if not isinstance(self._reward, RewardRule):
            outcomes_of_calls = [call.result() for call in self._submit_custom(requests)]
            return self._counted(_custom_grades(outcomes_of_calls, len(requests)))
        rules = _rules_of(requests, self._reward)
        decided = list(map(self._decide, rules, requests))
        pending = self._submit(decided)
        outcomes = {call: future.result() for call, future in pending.items()}
        return self._settled(rules, decided, outcomes)

    async def grade_async(self, requests: Sequence[GradeRequest]) -> list[Grade]:
        """As `grade`, without blocking the event loop."""
        if not isinstance(self._reward, RewardRule):
            calls = self._submit_custom(requests)
            outcomes_of_calls = await asyncio.gather(*map(asyncio.wrap_future, calls))
            return self._counted(_custom_grades(outcomes_of_calls, len(requests)))
        rules = _rules_of(requests, self._reward)
        decided = list(map(self._decide, rules, requests))
        pending = self._submit(decided)
        values = await asyncio.gather(*map(asyncio.wrap_future, pending.values()))
        return self._settled(rules, decided, dict(zip(pending, values, strict=True)))

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

    def _submit_custom(self, requests: Sequence[GradeRequest]) -> list[Future[Outcome]]:
        assert isinstance(self._reward, CustomReward)
        if self._reward.sees_group and requests:
            prompt, label = requests[0].prompt, requests[0].label
            return [self._pool.submit(prompt, [request.response for request in requests], label)]
        return [self._pool.submit(request.prompt, request.response, request.label) for request in requests]

    def _submit(self, decided: Sequence[Grade | _Question]) -> dict[Call, Future[Outcome]]:
        calls = dict.fromkeys(item.call for item in decided if isinstance(item, _Question))
        return {call: self._known(call) or self._pool.submit(*call) for call in calls}

    def _settled(
        self, rules: Sequence[RewardRule], decided: Sequence[Grade | _Question], outcomes: Mapping[Call, Outcome]
    ) -> list[Grade]:
        return self._counted([self._settle(rule, item, outcomes) for rule, item in zip(rules, decided, strict=True)])

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


def _rules_of(requests: Sequence[GradeRequest], general: RewardRule) -> list[RewardRule]:
    """The rule of each request."""
    return [general if request.rm_type is None else REWARD_RULES[request.rm_type] for request in requests]


def _graded(rule: RewardRule, answer: str, equal: bool, value: str) -> Grade:
    return Grade(rule.correct if equal else rule.wrong, GradeStatus.GRADED, answer, "", value)


def check_custom_reward(path: str) -> None:
    """Raises UserError if "module:function" names no function."""
    worker = Worker(path, CUSTOM_FLAG)
    try:
        worker.wait_until_ready()
    except EOFError as error:
        raise UserError(f"{CUSTOM_FLAG} {path}: the process that imports it ends") from error
    finally:
        worker.kill()


def _custom_grades(outcomes: Sequence[Outcome], count: int) -> list[Grade]:
    """Of so many responses, from a call for each, or one for all."""
    if len(outcomes) == 1:
        [(value, failure)] = [(outcome.value, outcome.failure) for outcome in outcomes]
        values = value if isinstance(value, list) else [value] * count
        return [_custom_grade(Outcome(one, failure)) for one in values]
    return list(map(_custom_grade, outcomes))


def _custom_grade(outcome: Outcome) -> Grade:
    reward, reason = outcome.value, outcome.failure
    if isinstance(reward, float) and not math.isfinite(reward):
        reason = f"the reward is {reward}"
    if reason or not isinstance(reward, float):
        return Grade(FAILED_REWARD, GradeStatus.GRADER_FAILED, None, reason)
    return Grade(reward, GradeStatus.GRADED, None, "")
