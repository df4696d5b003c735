"""Engines that die or hang while they generate: found in bounded time, replaced, and nothing is lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from aiohttp import web
from fake_engines import FakeEngine, answers, group_of, serving

from recipe.rollout.client import ClientCounters, ClientOptions, RolloutClient
from recipe.rollout.fleet import EnginePeer, Fleet, HealthOptions, OnSilent
from recipe.sampling.sample import FinishReason, SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError

SAMPLING = SamplingParams(max_new_tokens=4)
OPTIONS = ClientOptions(
    request_timeout_s=30, max_retries=2, backoff_s=0.01, health=HealthOptions(interval_s=0.2, timeout_s=0.5)
)
BOUND_S = 120.0


class HangingEngine(FakeEngine):
    """Takes requests and never answers; its connections stay open."""

    def __init__(self) -> None:
        super().__init__(self._hang)

    async def _hang(self, _: dict[str, Any]) -> web.Response:
        await asyncio.sleep(600)
        raise AssertionError

    async def verb(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        return await self._hang({})


async def slow(body: dict[str, Any]) -> web.Response:
    """An engine at work."""
    await asyncio.sleep(0.1)
    return answers(body)


@dataclass
class Owner:
    """Has silent engines replaced by the one at `url`, once it may, and notes their numbers."""

    url: str
    may: asyncio.Event | None = None
    replaced: list[int] = field(default_factory=list)

    async def __call__(self, number: int) -> str:
        self.replaced.append(number)
        if self.may is not None:
            await self.may.wait()
        return self.url


async def generate(client: RolloutClient, count: int) -> list[SampleGroup]:
    groups = [group_of(index) for index in range(count)]
    async with asyncio.timeout(BOUND_S), client.watched() as tasks:
        for group in groups:
            tasks.create_task(client.generate(group, SAMPLING, [1, 2]))
    return groups


def made_once(groups: list[SampleGroup]) -> bool:
    return all([sample.response_ids for sample in group.samples] == [[1], [2]] for group in groups)


@asynccontextmanager
async def opened(
    urls: list[str], on_silent: OnSilent, options: ClientOptions = OPTIONS
) -> AsyncIterator[RolloutClient]:
    async with RolloutClient(urls, options, on_silent) as client:
        yield client


async def test_a_hanging_engine_is_replaced_and_its_samples_are_made_by_others_meanwhile() -> None:
    all_are_taken = asyncio.Event()

    async def take(body: dict[str, Any]) -> web.Response:
        if len(other.bodies) == 8:
            all_are_taken.set()
        return await slow(body)

    hanging, other, fresh = HangingEngine(), FakeEngine(take), FakeEngine()
    async with serving(hanging, other, fresh) as (first, second, third):
        owner = Owner(third, all_are_taken)
        async with opened([first, second], owner) as client:
            groups = await generate(client, 8)
            assert await client.healthy() == [True, True]
            lost = len(hanging.bodies)
            assert client.counters == ClientCounters(retries=lost, restarts=1, retried_tokens=2 * lost)
    assert owner.replaced == [0]
    assert lost > 0
    assert made_once(groups)
    assert fresh.bodies == [], "the other engine takes them at once"


async def test_an_engine_that_hangs_alone_has_its_samples_made_by_its_replacement() -> None:
    hanging, fresh = HangingEngine(), FakeEngine()
    async with serving(hanging, fresh) as (first, second), opened([first], Owner(second)) as client:
        groups = await generate(client, 3)
        assert client.counters.restarts == 1
    assert made_once(groups)
    assert len(fresh.bodies) == 3


class BusyEngine(FakeEngine):
    """Answers requests when it has been asked so often whether it is well; `says` what it answers then."""

    def __init__(self, *says: bool) -> None:
        super().__init__(self._work)
        self._says = list(says)
        self._done = asyncio.Event()

    async def _work(self, body: dict[str, Any]) -> web.Response:
        await self._done.wait()
        return answers(body)

    async def verb(self, request: web.Request) -> web.Response:
        self.healthy = self._says.pop(0) if self._says else True
        if not self._says:
            self._done.set()
        return await super().verb(request)


@pytest.mark.parametrize("says", [(True, True), (False, True, True, False, True)])
async def test_a_busy_engine_is_left_alone_though_a_single_check_may_fail(says: tuple[bool, ...]) -> None:
    engine = BusyEngine(*says)
    async with serving(engine) as urls, opened(urls, Owner("")) as client:
        assert made_once(await generate(client, 2))
        assert client.counters == ClientCounters()
    assert engine.calls.count("/health_generate") >= len(says)


async def test_an_engine_that_has_just_started_is_not_asked_after_an_unanswered_request_either() -> None:
    async def fail(_: dict[str, Any]) -> web.Response:
        return web.Response(status=500)

    engine, fresh = FakeEngine(fail), FakeEngine()
    engine.healthy = False
    options = replace(OPTIONS, health=replace(OPTIONS.health, interval_s=60, first_wait_s=1.5))
    began = asyncio.get_running_loop().time()
    async with serving(engine, fresh) as (first, second), opened([first], Owner(second), options) as client:
        assert made_once(await generate(client, 1))
        assert client.counters.restarts == 1
    assert asyncio.get_running_loop().time() - began > 1.5


async def test_an_engine_that_has_just_started_is_not_asked() -> None:
    hanging, fresh = HangingEngine(), FakeEngine()
    options = replace(OPTIONS, health=replace(OPTIONS.health, first_wait_s=1.5))
    began = asyncio.get_running_loop().time()
    async with serving(hanging, fresh) as (first, second), opened([first], Owner(second), options) as client:
        assert made_once(await generate(client, 1))
    assert asyncio.get_running_loop().time() - began > 1.5
    assert hanging.calls == ["/health_generate"] * 2


async def test_an_engine_that_cannot_be_replaced_ends_the_rollout_with_the_reason() -> None:
    async def give_up(_: int) -> str:
        raise UserError("engine 0 has not worked since")

    hanging, other = HangingEngine(), FakeEngine(slow)
    async with serving(hanging, other) as urls, opened(urls, give_up) as client:
        with pytest.raises(UserError, match="has not worked since"):
            await generate(client, 4)


async def test_an_engine_replaced_between_two_rollouts_is_counted_and_used() -> None:
    old, new = FakeEngine(), FakeEngine()
    async with serving(old, new) as (first, second), opened([first], Owner("")) as client:
        client.move([first])
        assert client.counters.restarts == 0
        client.move([second])
        assert client.counters.restarts == 1
        assert made_once(await generate(client, 1))
    assert (len(old.bodies), len(new.bodies)) == (0, 1)


class StubbornEngine(FakeEngine):
    """Answers a request when it is told to abort, like an engine; aborts only after the first telling."""

    def __init__(self, deaf: int) -> None:
        super().__init__(self._wait)
        self._deaf = deaf
        self._aborted = asyncio.Event()

    async def _wait(self, body: dict[str, Any]) -> web.Response:
        await self._aborted.wait()
        return answers(body, "abort")

    async def verb(self, request: web.Request) -> web.Response:
        if request.path == "/abort_request":
            self._deaf -= 1
            if self._deaf < 0:
                self._aborted.set()
        return await super().verb(request)


async def drained(client: RolloutClient, count: int, *asked: FakeEngine) -> list[SampleGroup]:
    """Groups of which the engines have had two requests each when the client is drained."""
    groups = [group_of(index) for index in range(count)]
    async with asyncio.timeout(BOUND_S), client.watched() as tasks:
        for group in groups:
            tasks.create_task(client.generate(group, SAMPLING, [1, 2]))
        for engine in asked:
            await engine.busy.wait()
        await client.drain()
    return groups


async def test_draining_aborts_until_all_have_answered_and_sends_nothing_more() -> None:
    engine = StubbornEngine(deaf=1)
    options = replace(OPTIONS, max_concurrency=2)
    async with serving(engine) as urls, opened(urls, Owner(""), options) as client:
        groups = await drained(client, 5, engine)
    assert len(engine.bodies) == 2
    lengths = [[sample.response_length for sample in group.samples] for group in groups]
    assert sorted(lengths) == [[0, 0]] * 3 + [[1, 1]] * 2
    assert {sample.finish_reason for group in groups for sample in group.samples} == {FinishReason.ABORT}


async def test_an_engine_that_hangs_while_it_is_drained_loses_its_samples_only() -> None:
    hanging, other, fresh = HangingEngine(), StubbornEngine(deaf=0), FakeEngine()
    async with serving(hanging, other, fresh) as (first, second, third):
        owner = Owner(third)
        async with opened([first, second], owner) as client:
            groups = await drained(client, 4, hanging, other)
            assert client.counters == ClientCounters(restarts=1)
    assert owner.replaced == [0]
    lengths = [[sample.response_length for sample in group.samples] for group in groups]
    assert sorted(lengths) == [[0, 0]] * 2 + [[1, 1]] * 2
    assert {sample.finish_reason for group in groups for sample in group.samples} == {FinishReason.ABORT}


async def test_an_engine_that_dies_while_another_is_replaced_is_waited_for_too() -> None:
    sick, begun = {1}, [asyncio.Event(), asyncio.Event()]

    async def is_healthy(engine: EnginePeer, _: float) -> bool:
        return engine.number not in sick

    async def replace(number: int) -> str:
        begun[number].set()
        await begun[0].wait()
        if number == 0:
            assert fleet.engines[1].replacement is not None
            await asyncio.wait([fleet.engines[1].replacement])
        return f"http://new-{number}"

    fleet = Fleet(["http://a", "http://b"], is_healthy, replace, HealthOptions(interval_s=0.02, timeout_s=1))
    watch = asyncio.create_task(fleet.watch())
    async with asyncio.timeout(BOUND_S):
        await begun[1].wait()
        settled = asyncio.create_task(fleet.settle())
        sick.symmetric_difference_update({0, 1})
        await begun[0].wait()
        sick.clear()
        await settled
        watch.cancel()
        assert [engine.url for engine in fleet.engines] == ["http://new-0", "http://new-1"]
        await fleet.least_loaded()


async def test_who_ends_the_watch_ends_no_replacement() -> None:
    """The next rollout would wait for it for ever."""
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def is_healthy(_: EnginePeer, __: float) -> bool:
        return False

    async def replace(_: int) -> str:
        begun.set()
        await may_end.wait()
        return "http://new"

    fleet = Fleet(["http://a"], is_healthy, replace, HealthOptions(interval_s=0.02, timeout_s=1))
    watch = asyncio.create_task(fleet.watch())
    async with asyncio.timeout(BOUND_S):
        await begun.wait()
        watch.cancel()
        await asyncio.wait([watch])
        may_end.set()
        assert (await fleet.least_loaded()).url == "http://new"
