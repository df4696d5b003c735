"""The client while engines stand still for new weights: none is taken for dead, and no request's time runs."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from fake_engines import FakeEngine, answers, group_of, serving

from recipe.rollout.client import ClientCounters, ClientOptions, RolloutClient
from recipe.rollout.deadlines import Deadlines
from recipe.rollout.fleet import EnginePeer, Fleet, HealthOptions
from recipe.sampling.errors import StaleWeights
from recipe.sampling.sampling_params import SamplingParams

SAMPLING = SamplingParams(max_new_tokens=4)
OPTIONS = ClientOptions(
    request_timeout_s=1.0, max_retries=0, backoff_s=0.01, health=HealthOptions(interval_s=0.05, timeout_s=10.0)
)
BOUND_S = 120.0


class StillEngine(FakeEngine):
    """Answers nothing, and is not well, until it goes on."""

    def __init__(self) -> None:
        super().__init__(self._wait)
        self.goes_on, self.is_asked_again, self.is_found_well = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.healthy = False

    def go_on(self) -> None:
        self.healthy = True
        self.goes_on.set()

    async def verb(self, request: web.Request) -> web.StreamResponse:
        if self.calls:
            self.is_asked_again.set()
        if self.healthy:
            self.is_found_well.set()
        return await super().verb(request)

    async def _wait(self, body: dict[str, Any]) -> web.Response:
        await self.goes_on.wait()
        return answers(body)


async def not_dead(_: int) -> str:
    raise AssertionError("it is taken for dead")


async def test_an_engine_that_stands_still_is_not_taken_for_dead_and_no_requests_time_runs() -> None:
    engine, group = StillEngine(), group_of()
    async with serving(engine) as urls, RolloutClient(urls, OPTIONS, not_dead) as client, asyncio.timeout(BOUND_S):
        async with client.watched() as tasks, client.updating("2"):
            tasks.create_task(client.generate(group, SAMPLING, [1, 2]))
            await asyncio.sleep(1.5)
            engine.go_on()
        assert client.counters == ClientCounters()
    assert [sample.response_ids for sample in group.samples] == [[1], [2]]
    assert len(engine.bodies) == 1


async def test_a_check_that_was_under_way_when_weights_came_counts_for_nothing() -> None:
    """The second one that fails, after which the engine would be dead."""
    engine = StillEngine()
    options = replace(OPTIONS, health=replace(OPTIONS.health, interval_s=0.0))
    async with serving(engine) as urls, RolloutClient(urls, options, not_dead) as client, asyncio.timeout(BOUND_S):

        async def update_when_asked() -> None:
            await engine.is_asked_again.wait()
            async with client.updating("2"):
                await asyncio.sleep(0.5)
                engine.go_on()

        async with client.watched() as tasks:
            tasks.create_task(update_when_asked())
            tasks.create_task(engine.is_found_well.wait())
    assert engine.calls.count("/health_generate") > 2


async def test_weights_wait_for_an_engine_that_is_being_replaced() -> None:
    async def replaced(_: int) -> str:
        await asyncio.sleep(0.1)
        return "http://new"

    async def is_healthy(engine: EnginePeer, timeout_s: float) -> bool:
        return engine.url == "http://new"

    fleet = Fleet(["http://old"], is_healthy, replaced, OPTIONS.health)
    [engine] = fleet.engines
    assert not await fleet.examine(engine, 0)
    async with fleet.updating():
        assert engine.url == "http://new"


async def test_nobody_turns_to_an_engine_that_did_not_answer_while_weights_are_on_their_way() -> None:
    """It may be dead, and is examined when they have come; meanwhile it has the fewest samples."""

    async def is_healthy(engine: EnginePeer, timeout_s: float) -> bool:
        return engine.number == 0

    fleet = Fleet(["http://busy", "http://dead"], is_healthy, not_dead, OPTIONS.health)
    busy, dead = fleet.engines
    busy.load = 100
    async with fleet.updating():
        assert await fleet.least_loaded() is dead
        examined = asyncio.create_task(fleet.examine(dead, 0))
        await asyncio.sleep(0.05)
        assert await fleet.least_loaded() is busy
        dead.move("http://again")
    assert not await examined
    assert await fleet.least_loaded() is dead


async def test_an_engine_is_not_reported_to_an_update_that_has_begun() -> None:
    """Whoever sends the weights looks for dead engines, too, and both would start it again."""
    begins, checks = asyncio.Event(), 0

    async def is_healthy(engine: EnginePeer, timeout_s: float) -> bool:
        nonlocal checks
        checks += 1
        if checks == 2:
            begins.set()
        return False

    async def replaced(_: int) -> str:
        await asyncio.sleep(0.1)
        return "http://new"

    fleet = Fleet(["http://old"], is_healthy, replaced, OPTIONS.health)
    [engine] = fleet.engines

    async def update() -> None:
        await begins.wait()
        async with fleet.updating():
            assert engine.replacement is None
            await asyncio.sleep(0.05)
            assert engine.replacement is None

    await asyncio.gather(update(), fleet.examine(engine, 0))
    assert engine.restarts == 1


async def test_waits_have_what_was_left_of_them_when_time_runs_again() -> None:
    deadlines = Deadlines()
    with pytest.raises(TimeoutError):
        async with deadlines.within(0.05):
            await asyncio.sleep(BOUND_S)
    waits = [asyncio.create_task(wait(deadlines, 1.0))]
    await asyncio.sleep(0)
    deadlines.stop()
    waits.append(asyncio.create_task(wait(deadlines, 0.1)))
    await asyncio.sleep(1.2)
    assert not any(one.done() for one in waits)
    deadlines.go_on()
    assert await asyncio.gather(*waits) == ["too long"] * 2
    async with deadlines.within(None):
        deadlines.stop()


async def wait(deadlines: Deadlines, seconds: float) -> str:
    try:
        async with deadlines.within(seconds):
            await asyncio.sleep(BOUND_S)
    except TimeoutError:
        return "too long"
    return "done"


@pytest.mark.parametrize("keeps_cache", [True, False])
async def test_what_older_weights_made_is_not_found_again_in_a_cache_that_is_kept(keeps_cache: bool) -> None:
    engine = FakeEngine()
    options = replace(OPTIONS, keeps_cache=keeps_cache)
    async with serving(engine) as urls, RolloutClient(urls, options) as client:
        for version in ("0", "1"):
            async with client.updating(version):
                pass
            await client.generate(group_of(), SAMPLING, [1, 2])
    assert [body.get("extra_key") for body in engine.bodies] == (["0", "1"] if keeps_cache else [None, None])


class VersionedEngine(FakeEngine):
    """Answers, once it may, as one that has the weights of its version."""

    def __init__(self, version: str) -> None:
        super().__init__(self._answer)
        self.version, self.may_answer = version, asyncio.Event()
        self.may_answer.set()

    async def _answer(self, body: dict[str, Any]) -> web.Response:
        version = self.version
        await self.may_answer.wait()
        return answers(body, version=version)


@pytest.mark.parametrize("stale", ["9", "default"])
async def test_an_engine_that_missed_an_update_is_found_at_its_first_answer_to_what_it_was_sent_since(
    stale: str,
) -> None:
    """However old its tokens might be; and as a number "10" is newer than "9"."""
    good, bad = VersionedEngine("10"), VersionedEngine(stale)
    async with serving(good, bad) as urls, RolloutClient(urls, OPTIONS) as client, asyncio.timeout(BOUND_S):
        async with client.updating("10"):
            pass
        wanted = f"engine 1 answered under weight version {stale} .* taken version 10: it missed a weight update"
        good.may_answer.clear()
        under_way = [asyncio.create_task(client.generate(group_of(index), SAMPLING, [1, 2])) for index in range(2)]
        with pytest.raises(StaleWeights, match=wanted):
            await under_way[1]
        good.may_answer.set()
        await under_way[0]


async def test_what_was_sent_before_an_update_was_over_may_be_older_and_what_an_engine_has_may_be_newer() -> None:
    engine = VersionedEngine("9")
    engine.may_answer.clear()
    async with serving(engine) as urls, RolloutClient(urls, OPTIONS) as client, asyncio.timeout(BOUND_S):
        async with client.updating("9"):
            pass
        async with client.watched() as tasks:
            tasks.create_task(client.generate(group_of(0), SAMPLING, [1, 2]))
            async with client.updating("10"):
                tasks.create_task(client.generate(group_of(1), SAMPLING, [1, 2]))
                await engine.busy.wait()
            engine.may_answer.set()
        engine.version = "11"
        await client.generate(group_of(2), SAMPLING, [1, 2])
