"""Rollouts that are made while the trainer works, no further ahead of it than `--max-staleness` allows.

Two orders of admission. *Fixed*: one rollout after the other, each wholly under the weights of the newest version that
it may be made under without waiting, and an update of the weights waits for all that are to be made under the older
ones; so samples depend on their seeds alone, as in a run that makes no rollout ahead. *Finished*: single groups, of
which the first to finish make the next rollout as far as `recipe.rollout.admission` has it, and an update waits only
for the groups that are under way, or, where weights are updated in flight, for nothing.

What is finished and not yet trained stands in checkpoints. What is under way does not: its prompts are drawn again.
"""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self, TypedDict

from recipe.data.source import Draws, SourceState
from recipe.rewards import GradeStatus
from recipe.rollout.admission import Admission
from recipe.rollout.client import ClientCounters, RolloutClient
from recipe.rollout.collect import CollectionPlan, RolloutCollector, check_failures, nothing_to_learn
from recipe.rollout.filters import GroupFilter
from recipe.rollout.generate import (
    GenerationMetrics,
    OnGroup,
    Rollout,
    SamplingMetrics,
    SeedStream,
    check_finished,
    check_versions,
)
from recipe.rollout.pending import finished_as_json, finished_from_json
from recipe.sampling.sample import NO_WEIGHTS, SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.threads import in_thread

FAILURES = (GradeStatus.GRADER_FAILED, GradeStatus.LEFT_OUT)

SeedsOf = Callable[[int], SeedStream]
"""The random stream of a rollout, by its number."""


class AheadState(TypedDict):
    """The part of `recipe.messages.Progress` that tells what is made ahead."""

    data: dict[str, Any]
    """State of the prompt source, in which the draws of what is under way are not made."""
    ahead: list[dict[str, Any]]
    """What is finished, in parts: the number of their rollout, or None where they belong to none yet, and groups."""


class Ahead(ABC):
    """Makes rollouts in a task of its own. Use as an asynchronous context manager, which ends it; from one event loop.

    The loop calls `next`, trains, calls `trained`, then `pause` before the weights of the engines change and `advance`
    when they have, and `go_on`. A failure of the task is raised by whatever waits for it.
    """

    def __init__(self, source: Draws, plan: CollectionPlan, admission: Admission) -> None:
        self._source, self._plan, self._admission = source, plan, admission
        self._is_open = False
        """Whether anything may be started."""
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._taken: Rollout | None = None
        """What is trained now."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._task

    def go_on(self) -> None:
        """Begins to make rollouts, or goes on after a pause."""
        self._is_open = True
        if self._task is None:
            self._task = asyncio.create_task(self._make())
            self._task.add_done_callback(lambda _: self._tell())
        self._tell()

    async def next(self) -> Rollout:
        """The next rollout, graded, once it is there. Raises what `RolloutCollector.collect` does."""
        self.go_on()
        while self._admission.batch() is None:
            await self._wait()
        number = self._admission.next_rollout
        self._taken = self._rollout(number, self._admission.take())
        for group in self._taken.groups:
            check_versions(group, str(number), max_staleness=self._plan.max_staleness)
        return self._taken

    def trained(self) -> None:
        """What `next` told last is trained."""
        self._taken = None

    @abstractmethod
    async def pause(self) -> None:
        """Returns when nothing is under way that is to be made under the present weights. Until `go_on` nothing more is
        started. Raises as `next`."""

    def advance(self, version: int) -> None:
        """The engines hold the weights of `version`."""
        self._admission.advance(version)
        self._tell()

    def state(self) -> AheadState:
        """What a checkpoint holds."""
        return {"data": dict(self._source_state()), "ahead": self._finished()}

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what the checkpoint holds whose source is loaded. What does not fit this run, being of another
        order or size or too old, is not taken, nor what nothing could be generated or graded of, which may be what the
        run failed at: its prompts are drawn again."""
        groups = [[finished_from_json(content, self._source.prompt_of) for content in part["groups"]] for part in state]
        for place, part in enumerate(state):
            oldest = _oldest_version([group for later in groups[place:] for group in later])
            self._source.put_back(group.index for group in self._take_over(part, groups[place], oldest))

    def _tell(self) -> None:
        """Wakes all that wait."""
        self._news.set()
        self._news = asyncio.Event()

    async def _wait(self) -> None:
        """Returns when something has happened. Raises what the task failed with."""
        assert self._task is not None
        if self._task.done():
            self._task.result()
        await self._news.wait()

    @abstractmethod
    async def _make(self) -> None:
        """The task."""

    @abstractmethod
    def _rollout(self, number: int, units: list[int]) -> Rollout:
        """The rollout of this number, from units that are finished."""

    @abstractmethod
    def _source_state(self) -> SourceState:
        """That of the source without the draws of what is under way."""

    @abstractmethod
    def _finished(self) -> list[dict[str, Any]]:
        """What is finished and not trained; see `AheadState`."""

    @abstractmethod
    def _take_over(self, part: Mapping[str, Any], groups: list[SampleGroup], oldest: int | None) -> list[SampleGroup]:
        """Takes over a part of a checkpoint; `oldest` is the oldest version in it and those that follow. Returns the
        groups that are not taken."""


class FixedOrder(Ahead):
    """Rollouts one after the other."""

    def __init__(
        self, collector: RolloutCollector, source: Draws, plan: CollectionPlan, admission: Admission, seeds: SeedsOf
    ) -> None:
        super().__init__(source, plan, admission)
        self._collector, self._seeds = collector, seeds
        self._next = admission.next_rollout
        """The number of the rollout that is made next."""
        self._rollouts: dict[int, Rollout] = {}
        self._before: SourceState | None = None
        """State of the source before the rollout that is under way."""

    async def _make(self) -> None:
        while True:
            while not (self._is_open and self._admission.has_room()):
                await self._news.wait()
            self._before = self._source.state_dict()
            self._admission.start(self._next)
            self._rollouts[self._next] = await self._collector.collect(self._seeds(self._next), str(self._next))
            self._before = None
            self._admission.finish(self._next, passes=True)
            self._next += 1
            self._tell()

    async def pause(self) -> None:
        while self._is_open and (self._before is not None or self._admission.has_room()):
            await self._wait()
        self._is_open = False

    def _rollout(self, number: int, units: list[int]) -> Rollout:
        assert units == [number]
        return self._rollouts.pop(number)

    def _source_state(self) -> SourceState:
        return self._before or self._source.state_dict()

    def _finished(self) -> list[dict[str, Any]]:
        taken = {} if self._taken is None else {int(self._taken.weight_version): self._taken}
        return [
            {
                "rollout": number,
                "groups": [*map(finished_as_json, rollout.groups)],
                "sampling": asdict(rollout.sampling),
                "seconds": rollout.metrics.seconds,
            }
            for number, rollout in (taken | self._rollouts).items()
        ]

    def _take_over(self, part: Mapping[str, Any], groups: list[SampleGroup], oldest: int | None) -> list[SampleGroup]:
        # A rollout counts as no newer than those after it, also where engines that were started again made it newer.
        fits = part["rollout"] == self._next and _are_of_use(self._plan, groups) and len(groups) == self._plan.groups
        if not (fits and self._admission.has_room(oldest)):
            return groups
        version = str(self._next)
        metrics = GenerationMetrics.of(groups, version, part["seconds"], ClientCounters(), ahead=True)
        self._rollouts[self._next] = Rollout(groups, version, metrics, SamplingMetrics(**part["sampling"]))
        self._admission.start(self._next, oldest)
        self._admission.finish(self._next, passes=True)
        self._next += 1
        return []


class FirstFinished(Ahead):
    """Single groups, each followed by another as soon as there is room."""

    def __init__(
        self,
        client: RolloutClient,
        source: Draws,
        plan: CollectionPlan,
        admission: Admission,
        sampling: SamplingParams,
        seeds: SeedStream,
        *,
        grade: OnGroup,
        keep: GroupFilter | None = None,
    ) -> None:
        """`seeds`: those of a group are named by the number of its draw."""
        super().__init__(source, plan, admission)
        self._client, self._sampling, self._seeds, self._grade = client, sampling, seeds, grade
        self._keep: GroupFilter = keep or (lambda _: True)
        self._groups: dict[int, SampleGroup] = {}
        """Those that are ready."""
        self._dropped: list[SampleGroup] = []
        """Since the last rollout."""
        self._dropped_in_a_row: list[SampleGroup] = []
        self._watches = False
        self._since, self._counters = time.monotonic(), client.counters

    async def _make(self) -> None:
        self._begin()
        while True:
            while not self._is_open:
                await self._news.wait()
            self._watches = True
            async with self._client.watched() as tasks:
                while self._is_open or self._admission.under_way:
                    while self._is_open and self._admission.has_room():
                        self._start(tasks)
                    await self._news.wait()
            self._watches = False
            self._tell()

    async def pause(self) -> None:
        self._is_open = False
        self._tell()
        while self._watches:
            await self._wait()

    def _start(self, tasks: asyncio.TaskGroup) -> None:
        [draw] = self._source.draw(1)
        self._admission.start(draw.number)
        tasks.create_task(self._complete(SampleGroup.of(draw.prompt, draw.number, self._plan.n_samples)))

    async def _complete(self, group: SampleGroup) -> None:
        seeds = self._seeds.sample_seeds(group.index, self._plan.n_samples)
        await self._client.generate(group, self._sampling, seeds, routed=True)
        check_finished(group)
        await self._grade(group)
        if passes := await in_thread(self._keep, group):
            self._groups[group.index] = group
            self._dropped_in_a_row = []
        else:
            self._dropped.append(group)
            self._dropped_in_a_row.append(group)
            self._check_dropped()
        self._admission.finish(group.index, passes=passes)
        self._tell()

    def _check_dropped(self) -> None:
        """Raises NothingToLearn if as many groups were dropped in a row as all refills of a rollout are."""
        dropped = self._dropped_in_a_row
        if len(dropped) >= (1 + self._plan.max_refills) * self._plan.groups:
            check_failures(dropped, self._client)
            raise nothing_to_learn(dropped, len(dropped), len(dropped), self._plan.groups)

    def _rollout(self, number: int, units: list[int]) -> Rollout:
        groups = [self._groups[unit] for unit in sorted(units)]
        check_failures(groups, self._client)
        for group in groups:
            del self._groups[group.index]
        seconds = time.monotonic() - self._since
        metrics = GenerationMetrics.of(groups, str(number), seconds, self._client.counters - self._counters, ahead=True)
        metrics = replace(metrics, course=self._client.course.points())
        dropped = len(self._dropped)
        self._begin()
        return Rollout(groups, str(number), metrics, SamplingMetrics(dropped, 0, dropped))

    def _begin(self) -> None:
        """What is told of the next rollout begins here."""
        self._since, self._counters, self._dropped = time.monotonic(), self._client.counters, []
        self._client.course.begin()

    def _source_state(self) -> SourceState:
        return self._source.state_dict(self._admission.under_way)

    def _finished(self) -> list[dict[str, Any]]:
        groups = [*self._groups.values()] + ([] if self._taken is None else self._taken.groups)
        return [{"rollout": None, "groups": [*map(finished_as_json, groups)]}] if groups else []

    def _take_over(self, part: Mapping[str, Any], groups: list[SampleGroup], oldest: int | None) -> list[SampleGroup]:
        others = []
        for group in groups:
            oldest = _oldest_version([group])
            if _are_of_use(self._plan, [group]) and self._admission.has_room(oldest):
                self._admission.start(group.index, oldest)
                self._admission.finish(group.index, passes=True)
                self._groups[group.index] = group
            else:
                others.append(group)
        return others


def _are_of_use(plan: CollectionPlan, groups: Sequence[SampleGroup]) -> bool:
    """Whether they have the run's size, and there is a sample in them that could be generated and graded."""
    grades = [sample.grade for group in groups for sample in group.samples]
    is_graded = any(grade is not None and grade.status not in FAILURES for grade in grades)
    return is_graded and all(len(group.samples) == plan.n_samples for group in groups)


def _oldest_version(groups: Sequence[SampleGroup]) -> int | None:
    """The oldest that made a token of them."""
    versions = {version for group in groups for sample in group.samples for version in sample.weight_versions}
    return min(map(int, versions - {NO_WEIGHTS}), default=None)


def put_back(source: Draws, state: Sequence[Mapping[str, Any]]) -> None:
    """Has the prompts drawn again of what a checkpoint holds that was made ahead, in a run that makes nothing ahead."""
    source.put_back(group["index"] for part in state for group in part["groups"])
