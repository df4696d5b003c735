"""Rollouts that are made ahead, one after the other: when the weights may change."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from rollout_support import make_prompt

from recipe.data.source import PromptSource
from recipe.rewards import Grade, GradeStatus
from recipe.rollout.admission import Admission
from recipe.rollout.ahead import Ahead, FirstFinished, FixedOrder
from recipe.rollout.client import ClientCounters
from recipe.rollout.collect import CollectionPlan
from recipe.rollout.generate import GenerationMetrics, Rollout, SeedStream
from recipe.rollout.pending import finished_as_json
from recipe.run.conditions import Course
from recipe.sampling.sample import FinishReason, SampleGroup, grade_group
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError


class Collector:
    """Makes empty rollouts."""

    def __init__(self) -> None:
        self.made: list[str] = []

    async def collect(self, _: SeedStream, version: str) -> Rollout:
        await asyncio.sleep(0)
        self.made.append(version)
        return Rollout([], version, GenerationMetrics(0, 0, 0, 1.0, 0, ClientCounters()))


async def test_weights_wait_for_rollouts_too_that_have_not_begun() -> None:
    """Else it would be a matter of time under which weights they are made."""
    collector, source = Collector(), PromptSource([make_prompt(0, (1,))], shuffle=False, seed=1)
    admission = Admission(1, 2, rollouts=9)
    plan = CollectionPlan(groups=1, n_samples=2, draw_size=1, max_staleness=2)
    ahead = FixedOrder(cast(Any, collector), source, plan, admission, lambda number: SeedStream(1, (number,)))
    async with ahead:
        ahead.go_on()
        await ahead.pause()
        assert collector.made == ["0", "1", "2"]
        for number in range(3):
            assert (await ahead.next()).weight_version == str(number)
            ahead.trained()
            await ahead.pause()
            ahead.advance(number + 1)
            assert collector.made[-1] == str(number + 2), "nothing begins before the weights are there"
            ahead.go_on()
            await ahead.pause()
            assert collector.made[-1] == str(number + 3)


def finished(source: PromptSource, version: str, status: GradeStatus = GradeStatus.GRADED) -> dict[str, Any]:
    """The next group, made under one version, as a checkpoint holds it."""
    [draw] = source.draw(1)
    group = SampleGroup.of(draw.prompt, draw.number, 2)
    for sample in group.samples:
        sample.append_model([1], [-0.5], [version])
        sample.finish_reason, sample.grade = FinishReason.STOP, Grade(1.0, status, None, "")
    return finished_as_json(group)


async def test_a_checkpoints_rollouts_stay_in_order_though_the_first_is_newer() -> None:
    """Engines that were started again made it under newer weights than those that made the next one."""
    source = PromptSource([make_prompt(number, (1,)) for number in range(2)], shuffle=False, seed=1)
    parts = [
        {"rollout": number, "groups": [finished(source, version)], "sampling": {}, "seconds": 1.0}
        for number, version in [(2, "2"), (3, "1")]
    ]
    admission, plan = Admission(1, 2, rollouts=9, done=2), CollectionPlan(1, 2, 1, max_staleness=2)
    ahead = FixedOrder(cast(Any, Collector()), source, plan, admission, lambda number: SeedStream(1, (number,)))
    ahead.load_state(parts)
    async with ahead:
        assert [(await ahead.next()).weight_version for _ in parts] == ["2", "3"]


def of_order(order: type[Ahead], source: PromptSource, client: Any = None) -> Ahead:
    """Of nine rollouts of one group."""
    admission, plan = Admission(1, 2, rollouts=9), CollectionPlan(1, 2, 1, max_staleness=2)
    if order is FixedOrder:
        return FixedOrder(cast(Any, Collector()), source, plan, admission, lambda number: SeedStream(1, (number,)))
    return FirstFinished(
        client or NoSample(), source, plan, admission, SamplingParams(1), SeedStream(1, ()), grade=no_grade
    )


async def no_grade(group: SampleGroup) -> None:
    await grade_group(None, group)


class NoSample:
    """A client whose custom generate function fails at every sample."""

    course, counters, last_failure = Course(), ClientCounters(), "the tool is away"

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[asyncio.TaskGroup]:
        async with asyncio.TaskGroup() as tasks:
            yield tasks

    async def generate(self, group: SampleGroup, *_: Any, routed: bool) -> None:
        for sample in group.samples:
            sample.fail()


def prompts() -> PromptSource:
    return PromptSource([make_prompt(number, (1,)) for number in range(9)], shuffle=False, seed=1)


@pytest.mark.parametrize("order", [FixedOrder, FirstFinished])
async def test_what_the_graders_failed_at_is_drawn_again(order: type[Ahead]) -> None:
    """The run ended for it, and was saved."""
    for status, again in [(GradeStatus.GRADER_FAILED, [0]), (GradeStatus.GRADED, [])]:
        source = prompts()
        ahead = of_order(order, source)
        ahead.load_state([{"rollout": 0, "groups": [finished(source, "0", status)], "sampling": {}, "seconds": 1.0}])
        assert source.state_dict()["put_back"] == again


async def test_what_could_not_be_generated_is_drawn_again() -> None:
    source = prompts()
    ahead = of_order(FirstFinished, source)
    async with ahead:
        with pytest.raises(UserError, match=r"no sample of a rollout could be .*: the tool is away"):
            await ahead.next()
    state, later = ahead.state(), prompts()
    later.load_state_dict(cast(Any, state["data"]))
    of_order(FirstFinished, later).load_state(state["ahead"])
    assert later.state_dict()["put_back"] == list(range(later.state_dict()["drawn"])) != []
