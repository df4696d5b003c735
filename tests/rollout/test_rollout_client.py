"""The client: least-loaded engines, bounded retries, recovery of dead engines, each sample exactly once."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_engines import FakeEngine, answers, group_of, serving
from rollout_support import make_prompt

from recipe.engines.launch import launch_embedded
from recipe.engines.process import EngineProcess
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.sampling.errors import EngineAnswerError, EngineRefused, EngineUnreachable
from recipe.sampling.http import ask, open_session
from recipe.sampling.sample import SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError
from recipe.weight_sync.client import WeightsClient

SAMPLING = SamplingParams(max_new_tokens=4)

QUICK = ClientOptions(request_timeout_s=60, max_retries=2, backoff_s=0.01)


async def test_a_group_is_one_request_with_a_seed_for_each_sample() -> None:
    engine, answered = FakeEngine(), list[int]()
    async with serving(engine) as urls, RolloutClient(urls, QUICK, on_answer=answered.append) as client:
        group = group_of()
        await client.generate(group, SAMPLING, [11, 12])
    assert answered == [0]
    assert len(engine.bodies) == 1
    body = engine.bodies[0]
    assert body["input_ids"] == [[5, 6, 7], [5, 6, 7]]
    assert [params["sampling_seed"] for params in body["sampling_params"]] == [11, 12]
    assert body["return_logprob"] is True
    assert [sample.response_ids for sample in group.samples] == [[1], [2]]


async def test_a_sample_goes_on_from_its_response() -> None:
    engine = FakeEngine()
    async with serving(engine) as urls, RolloutClient(urls, QUICK) as client:
        group = group_of(n_samples=1)
        group.samples[0].append_model([9, 8], [-1.0, -1.0], ["0", "0"])
        await client.generate(group, SAMPLING, [1])
    assert engine.bodies[0]["input_ids"] == [[5, 6, 7, 9, 8]]
    assert engine.bodies[0]["sampling_params"][0]["max_new_tokens"] == 2
    assert group.samples[0].response_ids == [9, 8, 1]
    assert group.samples[0].weight_versions == ["0", "0", "1"]


async def test_requests_go_to_the_least_loaded_engine() -> None:
    gate, arrived = asyncio.Event(), asyncio.Semaphore(0)

    async def wait(body: dict[str, Any]) -> web.Response:
        arrived.release()
        await gate.wait()
        return answers(body)

    engines = [FakeEngine(wait), FakeEngine(wait), FakeEngine(wait)]
    async with serving(*engines) as urls, RolloutClient(urls, QUICK) as client:
        tasks = []
        for index, size in enumerate([8, 2, 2, 2, 1]):
            tasks.append(asyncio.create_task(client.generate(group_of(index, size), SAMPLING, [0] * size)))
            await arrived.acquire()
        gate.set()
        await asyncio.gather(*tasks)
    assert [[len(body["input_ids"]) for body in engine.bodies] for engine in engines] == [[8], [2, 2], [2, 1]]


async def test_concurrency_is_bounded() -> None:
    running = peak = 0
    three = asyncio.Event()

    async def count(body: dict[str, Any]) -> web.Response:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        if running == 3:
            three.set()
        await three.wait()
        await asyncio.sleep(0.02)
        running -= 1
        return answers(body)

    options = ClientOptions(max_concurrency=3)
    async with serving(FakeEngine(count)) as urls, RolloutClient(urls, options) as client, asyncio.timeout(60):
        await asyncio.gather(*(client.generate(group_of(i), SAMPLING, [0, 0]) for i in range(12)))
    assert peak == 3


async def test_a_failing_request_is_sent_again_and_its_sample_made_once() -> None:
    failures = 2

    async def fail(body: dict[str, Any]) -> web.Response:
        nonlocal failures
        if failures:
            failures -= 1
            return web.Response(status=500)
        return answers(body)

    async with serving(FakeEngine(fail)) as urls, RolloutClient(urls, QUICK) as client:
        group = group_of()
        await client.generate(group, SAMPLING, [1, 2])
        assert client.counters.retries == 2
    assert [sample.response_ids for sample in group.samples] == [[1], [2]]


async def test_retries_end() -> None:
    async def fail(_: dict[str, Any]) -> web.Response:
        return web.Response(status=503)

    engine = FakeEngine(fail)
    async with serving(engine) as urls, RolloutClient(urls, QUICK) as client:
        with pytest.raises(EngineUnreachable, match=rf"^engine 0 at {urls[0]}/generate answered 503$"):
            await client.generate(group_of(), SAMPLING, [1, 2])
    assert len(engine.bodies) == QUICK.max_retries + 1


async def test_a_slow_answer_is_a_failure() -> None:
    async def sleep(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(30)
        return answers(body)

    options = ClientOptions(request_timeout_s=0.1, max_retries=1, backoff_s=0.01)
    async with serving(FakeEngine(sleep)) as urls, RolloutClient(urls, options) as client:
        with pytest.raises(EngineUnreachable, match="did not answer"):
            await client.generate(group_of(), SAMPLING, [1, 2])


@pytest.mark.parametrize(
    ("response", "error", "word"),
    [
        (lambda: web.json_response({"error": {"message": "too long"}}, status=400), EngineRefused, "400: too long"),
        (lambda: web.json_response({"success": False, "message": "bad"}, status=400), EngineRefused, "400: bad"),
        (lambda: web.json_response([{"output_ids": [1]}, {}]), EngineAnswerError, "not SGLang's"),
        (lambda: web.json_response([]), EngineAnswerError, "0 of 2"),
        (lambda: web.Response(text="hello"), EngineAnswerError, "no list"),
    ],
)
async def test_what_retrying_cannot_mend_is_raised_at_once(
    response: Callable[[], web.Response], error: type[Exception], word: str
) -> None:
    async def answer(_: dict[str, Any]) -> web.Response:
        return response()

    engine = FakeEngine(answer)
    async with serving(engine) as urls, RolloutClient(urls, QUICK) as client:
        group = group_of()
        with pytest.raises(error, match=word):
            await client.generate(group, SAMPLING, [1, 2])
    assert len(engine.bodies) == 1
    assert not any(sample.response_ids for sample in group.samples)


async def test_a_dead_engine_is_replaced_once_for_all_its_requests() -> None:
    dead, replacement, replaced = FakeEngine(), FakeEngine(), []

    async with serving(replacement) as (new_url,):
        async with serving(dead) as (old_url,):
            pass

        async def replace(number: int) -> str:
            replaced.append(number)
            await asyncio.sleep(0.05)
            return new_url

        async with RolloutClient([old_url], QUICK, replace) as client:
            groups = [group_of(index) for index in range(6)]
            await asyncio.gather(*(client.generate(group, SAMPLING, [1, 2]) for group in groups))
            assert client.counters.restarts == 1
    assert replaced == [0]
    assert all([sample.response_ids for sample in group.samples] == [[1], [2]] for group in groups)


async def test_an_engine_that_serves_but_does_not_generate_is_not_healthy() -> None:
    good, bad = FakeEngine(), FakeEngine()
    bad.healthy = False
    async with serving(good, bad) as urls, RolloutClient([*urls, "http://127.0.0.1:9"], QUICK) as client:
        assert await client.healthy() == [True, False, False]


async def test_servers_without_update_sessions_are_known() -> None:
    async def answer(body: dict[str, Any]) -> web.Response:
        return answers(body)

    engine = FakeEngine(answer)
    async with serving(engine) as [url], WeightsClient(0, url, 5) as client:
        await client.begin_weight_update()
        await client.end_weight_update()
    assert engine.calls == ["/begin_weight_update", "/end_weight_update"]


async def test_an_engine_killed_midway_loses_and_doubles_nothing(checkpoint: Path, tmp_path: Path) -> None:
    launch = launch_embedded(checkpoint, weight_version="1", threads=1, max_running_requests=32)
    with EngineProcess(launch, tmp_path / "first") as first, EngineProcess(launch, tmp_path / "second") as second:
        await asyncio.gather(*(asyncio.to_thread(one.wait_healthy, 600) for one in (first, second)))

        async def replace(_: int) -> str:
            return second.url

        sampling = SamplingParams(max_new_tokens=40, stop_token_ids=())
        seeds = {index: [100 * index, 100 * index + 1] for index in range(24)}
        async with RolloutClient([second.url], QUICK) as client:
            expected = [group_of(index) for index in seeds]
            await asyncio.gather(*(client.generate(group, sampling, seeds[group.index]) for group in expected))
        few = dataclasses.replace(QUICK, max_concurrency=8)  # most are still to be sent when the first is there
        async with RolloutClient([first.url], few, replace) as client:
            groups = [group_of(index) for index in seeds]
            tasks = [asyncio.create_task(client.generate(group, sampling, seeds[group.index])) for group in groups]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            os.kill(first.pid, signal.SIGKILL)
            await asyncio.gather(*tasks)
            assert client.counters.restarts == 1
    assert content_of(groups) == content_of(expected)


def content_of(groups: list[SampleGroup]) -> list[object]:
    return [
        (sample.index, sample.response_ids, sample.rollout_log_probs) for group in groups for sample in group.samples
    ]


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ((5, 8), "prompt 3 has the token id 8, outside the model's vocabulary of 8: the tokenizer is not the model's"),
        ((-1, 5), "prompt 3 has the token id -1, outside"),
        ((), "prompt 3 has no tokens"),
    ],
)
async def test_a_prompt_that_would_end_sglang_is_never_sent(ids: tuple[int, ...], sentence: str) -> None:
    engine = FakeEngine()
    options = dataclasses.replace(QUICK, vocab_size=8)
    async with serving(engine) as urls, RolloutClient(urls, options) as client:
        with pytest.raises(UserError, match=sentence):
            await client.generate(SampleGroup.of(make_prompt(3, ids), 0, 2), SAMPLING, [1, 2])
        await client.generate(SampleGroup.of(make_prompt(3, (0, 7)), 0, 1), SAMPLING, [1])
    assert [body["input_ids"] for body in engine.bodies] == [[[0, 7]]]


async def test_an_answer_without_end_is_given_up() -> None:
    async def flood(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        with suppress(ConnectionError):
            while True:
                await response.write(b" " * (1 << 20))
        return response

    await _is_refused(flood, "with more than 256 MiB")


@pytest.mark.parametrize(
    ("body", "told"), [(b"[" * 100_000, "damaged JSON"), (b'[{"a": NaN}]', "damaged JSON"), (b"[3", "damaged JSON")]
)
async def test_damaged_json_is_one_sentence(body: bytes, told: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    await _is_refused(answer, told)


async def test_nobody_is_sent_on_to_another_server() -> None:
    async def send_on(_: web.Request) -> web.Response:
        return web.Response(status=307, headers={"Location": "http://elsewhere.example/generate"})

    await _is_refused(send_on, "sends on to 'http://elsewhere.example/generate', which is not followed")


async def _is_refused(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], told: str) -> None:
    app = web.Application()
    app.router.add_post("/generate", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with open_session() as session:
            with pytest.raises(EngineAnswerError, match=told):
                await ask(session, "POST", f"http://127.0.0.1:{runner.addresses[0][1]}/generate", {}, timeout_s=600)
    finally:
        await runner.cleanup()
