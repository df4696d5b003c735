"""Samples that a user's function generates: token by token what engines and tools said, whatever happens meanwhile."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import compress
from operator import not_
from typing import Any

import generate_functions
import pytest
import torch
from aiohttp import web
from fake_engines import FakeEngine, answers, group_of, serving
from generate_functions import TOOL, Impatient, Tool
from rollout_support import EngineUnderTest, log_probs_of, make_prompt

from recipe.config import Config, RolloutConfig
from recipe.data.source import PromptSource
from recipe.data.tokenizer import load_tokenizer
from recipe.experience import advantages, rollout_metrics, sample_records, with_advantages
from recipe.generation.custom_generate import Generation, load_generate_function
from recipe.generation.turns import Codec, GenerateFunction, single_turn
from recipe.rewards import REWARD_RULES, Grade, Grader, RewardType
from recipe.rewards.grader import GradeStatus
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.rollout.collect import CollectionPlan, RolloutCollector
from recipe.rollout.generate import SeedStream, generate_rollout
from recipe.rollout.pending import PendingGroup
from recipe.sampling.sample import NO_WEIGHTS, FinishReason, Sample, SampleGroup, grade_group
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError

CONFIG = Config.model_validate(
    {
        "model": {"hf_checkpoint": "hf"},
        "data": {"prompt_data": "prompts"},
        "rollout": {"num_rollout": 1, "rollout_batch_size": 2, "rollout_max_response_len": 30},
        "optimizer": {"lr": 1e-3},
    }
)
SAMPLING = SamplingParams(max_new_tokens=30)
PROMPTS = [make_prompt(number, (number + 1, 2, 3)) for number in range(6)]
SEEDS = (5, 6, 7, 8)


def rollout_config(**more: Any) -> RolloutConfig:
    return RolloutConfig(num_rollout=1, rollout_batch_size=1, rollout_max_response_len=30, **more)


@asynccontextmanager
async def generating(
    embedded: EngineUnderTest, function: GenerateFunction, **more: Any
) -> AsyncIterator[RolloutClient]:
    """A client of the embedded engine whose samples are made by the function."""
    codec = Codec(load_tokenizer(embedded.checkpoint))
    path = None if function is single_turn else f"generate_functions:{getattr(function, '__name__', 'generate')}"
    generation = Generation(function, path, rollout_config(**more), codec, vocab_size=128)
    options = ClientOptions(generation=generation, max_retries=2, backoff_s=0.01, vocab_size=128)
    async with RolloutClient([embedded.url], options) as client:
        yield client


def content(group: SampleGroup) -> list[object]:
    return [
        (s.response_ids, s.rollout_log_probs, s.loss_mask, s.weight_versions, s.response, s.finish_reason, s.matched)
        for s in group.samples
    ]


async def made(client: RolloutClient, sampling: SamplingParams = SAMPLING) -> SampleGroup:
    group = SampleGroup.of(PROMPTS[0], 0, 4)
    await client.generate(group, sampling, SEEDS)
    return group


async def test_a_function_of_one_turn_is_the_default_bit_for_bit(embedded: EngineUnderTest) -> None:
    found = []
    for function in (single_turn, generate_functions.one_turn):
        embedded.flush()
        async with generating(embedded, function) as client:
            found.append(content(await made(client)))
    assert found[0] == found[1]


async def test_a_function_of_one_turn_sends_what_the_default_sends() -> None:
    bodies = []
    for generation in (Generation(), Generation(generate_functions.one_turn, "one", rollout_config())):
        engine = FakeEngine()
        async with serving(engine) as urls, RolloutClient(urls, ClientOptions(generation=generation)) as client:
            await client.generate(group_of(), SAMPLING, [1, 2])
        bodies.append(engine.bodies)
    assert bodies[0] == bodies[1]
    assert len(bodies[0]) == 1


async def test_what_the_model_says_after_a_tool_has_the_log_probs_of_a_fresh_scoring(embedded: EngineUnderTest) -> None:
    async with generating(embedded, Tool().generate) as client:
        group = await made(client)
    decode = Codec(load_tokenizer(embedded.checkpoint)).decode
    for sample in group.samples:
        spoken = [version != NO_WEIGHTS for version in sample.weight_versions]
        assert sample.turns == 3
        assert [*compress(sample.response_ids, map(not_, spoken))] == TOOL * 2
        assert sample.loss_mask == [int(is_spoken) for is_spoken in spoken]
        assert {*sample.weight_versions} == {"1", NO_WEIGHTS}
        expected = log_probs_of(embedded.reference, sample.tokens)[len(sample.prompt_ids) - 1 :]
        torch.testing.assert_close(
            torch.tensor(sample.rollout_log_probs)[spoken], expected[torch.tensor(spoken)], atol=1e-4, rtol=0
        )
        ended = sample.finish_reason is FinishReason.STOP
        assert sample.response == decode(sample.response_ids[:-1] if ended else sample.response_ids)


def restored(group: SampleGroup) -> SampleGroup:
    """Out of a checkpoint."""
    kept = json.loads(json.dumps(PendingGroup(group, SEEDS).as_json()))
    return PendingGroup.from_json(kept, lambda _: group.prompt).group


async def test_an_abort_while_the_tool_is_at_work_costs_nothing(embedded: EngineUnderTest) -> None:
    tool = Tool()
    async with generating(embedded, tool.generate) as client:
        expected = await made(client)
        tool.is_open.clear()
        tool.asked.clear()
        group, before = SampleGroup.of(PROMPTS[0], 0, 4), tool.ended
        task = asyncio.create_task(client.generate(group, SAMPLING, SEEDS))
        await tool.asked.wait()
        await client.drain()
        await task
        assert tool.ended == before + 4, "its `finally` ran"
        assert {sample.finish_reason for sample in group.samples} == {FinishReason.ABORT}
        assert {sample.turns for sample in group.samples} == {1}
        tool.is_open.set()
        group = restored(group)
        await client.generate(group, SAMPLING, SEEDS)
    assert [sample.response_ids for sample in group.samples] == [sample.response_ids for sample in expected.samples]
    assert [sample.response for sample in group.samples] == [sample.response for sample in expected.samples]
    assert [sample.finish_reason for sample in group.samples] == [sample.finish_reason for sample in expected.samples]


async def test_an_abort_within_a_turn_is_gone_on_from(embedded: EngineUnderTest) -> None:
    """Wherever it comes."""
    inside = 0
    async with generating(embedded, Tool().generate) as client:
        expected = await made(client)
        for delay in (*range(2, 30), *(30 * 2**more for more in range(9))):
            if delay >= 30 and inside:
                break  # else this machine is slow
            group = SampleGroup.of(PROMPTS[0], 0, 4)
            task = asyncio.create_task(client.generate(group, SAMPLING, SEEDS))
            await asyncio.sleep(delay / 1000)
            await client.drain()
            await task
            inside += any(sample.turn_end is None and sample.response_ids for sample in group.samples)
            group = restored(group)
            await client.generate(group, SAMPLING, SEEDS)
            found = [(sample.response_ids, sample.loss_mask, sample.response) for sample in group.samples]
            assert found == [(sample.response_ids, sample.loss_mask, sample.response) for sample in expected.samples]
    assert inside


async def test_a_turn_whose_engine_dies_is_asked_for_again() -> None:
    """The turns before it stay as they are."""

    async def handle(body: dict[str, Any]) -> web.Response:
        return web.Response(status=500) if len(engine.bodies) == 2 else answers(body)

    engine, group = FakeEngine(handle), group_of(n_samples=1)
    generation = Generation(Tool().generate, "tool", rollout_config())
    options = ClientOptions(generation=generation, max_retries=2, backoff_s=0.01)
    async with serving(engine) as urls, RolloutClient(urls, options) as client:
        await client.generate(group, SAMPLING, [1])
        assert (client.counters.retries, client.counters.retried_tokens) == (1, 1)
    assert group.samples[0].response_ids == [1, *TOOL, 1, *TOOL, 1]
    assert [body["input_ids"] for body in engine.bodies[1:3]] == [[[5, 6, 7, 1, *TOOL]]] * 2


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("raises", r"ZeroDivisionError: the tool broke \(generate_functions.py:\d+\)"),
        ("leaves", r"RuntimeError: it called sys.exit\(3\)"),
        ("hangs", r"it took over 0.3 s \(--custom-generate-timeout-s\)"),
        ("returns_text", r"it returned '.*': it must return the sample that it was given, or None"),
        ("says_nothing", "a sample in which the model has said nothing"),
        ("lacks_log_probs", r"the sample has \d+ response tokens, \d+ log-probs, \d+ versions and a loss mask of \d+"),
        ("trains_on_the_tool", "the loss mask trains on tokens that the model did not generate"),
        ("tells_another_vocabulary", "ValueError: 100000 is no token of the vocabulary of 128"),
        ("never_ends", "RuntimeError: it asks for another turn after an empty one"),
    ],
)
async def test_a_function_that_fails_is_named_and_its_sample_left_out(
    embedded: EngineUnderTest, caplog: pytest.LogCaptureFixture, name: str, problem: str
) -> None:
    function, limit_s = getattr(generate_functions, name), 0.3 if name == "hangs" else 60.0
    async with generating(embedded, function, custom_generate_timeout_s=limit_s) as client:
        group = await made(client)
        assert client.counters.failed_samples == 4
    assert {sample.finish_reason for sample in group.samples} == {FinishReason.FAILED}
    assert {sample.response_length for sample in group.samples} == {0}
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 4
    for sample, sentence in zip(group.samples, sorted(told), strict=True):
        assert f"generate_functions:{name} failed at sample {sample.index}: " in sentence
        assert "\n" not in sentence
    with pytest.raises(UserError, match=f"generate_functions:{name} failed at sample \\d: .*{problem}"):
        async with generating(
            embedded, function, custom_generate_timeout_s=limit_s, custom_generate_on_failure="stop"
        ) as client:
            await made(client)


async def test_a_function_that_swallows_its_end_holds_nobody_up(
    embedded: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipe.generation.custom_generate.FAREWELL_S", 0.1)
    async with generating(embedded, generate_functions.hangs_on, custom_generate_timeout_s=0.1) as client:
        group = await asyncio.wait_for(made(client), 60)
    assert {sample.finish_reason for sample in group.samples} == {FinishReason.FAILED}


async def test_waiting_for_an_engine_is_not_the_functions_time() -> None:
    async def handle(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(1.0)
        return answers(body)

    group = group_of()
    generation = Generation(generate_functions.one_turn, "one", rollout_config(custom_generate_timeout_s=0.5))
    async with (
        serving(FakeEngine(handle)) as urls,
        RolloutClient(urls, ClientOptions(generation=generation)) as client,
    ):
        await client.generate(group, SAMPLING, [1, 2])
    assert {sample.finish_reason for sample in group.samples} == {FinishReason.STOP}


async def test_an_answer_that_nobody_waits_for_is_in_no_sample() -> None:
    async def handle(body: dict[str, Any]) -> web.Response:
        impatient.is_asked.set()
        await asyncio.sleep(0.2)
        return answers(body)

    engine, group, impatient = FakeEngine(handle), group_of(n_samples=1), Impatient()
    generation = Generation(impatient.generate, "impatient", rollout_config())
    async with serving(engine) as urls, RolloutClient(urls, ClientOptions(generation=generation)) as client:
        await client.generate(group, SAMPLING, [1])
    assert len(engine.bodies) == 2
    assert group.samples[0].response_ids == [1]


@pytest.mark.parametrize(("turns", "expected"), [(1, 1), (2, 2), (None, 3)])
async def test_turns_are_bounded(embedded: EngineUnderTest, turns: int | None, expected: int) -> None:
    async def converses(sample: Sample, engine: Any, settings: Any) -> None:
        while (await engine.generate(max_new_tokens=4)).ids and sample.turns < 3:
            sample.append_environment(TOOL)

    async with generating(embedded, converses, custom_generate_max_turns=turns) as client:
        group = await made(client)
    for sample in group.samples:
        assert sample.turns == expected
        assert sample.truncated == (expected < 3 or sample.matched is None)


async def test_the_longest_response_bounds_all_that_is_said(embedded: EngineUnderTest) -> None:
    async def listens(sample: Sample, engine: Any, settings: Any) -> None:
        await engine.generate(max_new_tokens=4)
        sample.append_environment(list(range(1, 60)))
        assert (await engine.generate()).ids == ()

    async with generating(embedded, listens) as client:
        group = await made(client)
    for sample in group.samples:
        assert sample.response_length == SAMPLING.max_new_tokens
        assert sample.truncated
        assert sample.turns == 1
        assert sum(sample.loss_mask) == sample.generated_length <= 4


async def right_if_first(group: SampleGroup) -> None:
    """The rule is not asked of samples that are left out."""
    with Grader(REWARD_RULES[RewardType.MATH]) as grader:
        await grade_group(grader, group)
    for sample in group.samples:
        if not sample.is_left_out:
            sample.grade = Grade(float(sample.index % 4 == 0), GradeStatus.GRADED, None, "")


def collector_of(client: RolloutClient, groups: int) -> RolloutCollector:
    plan = CollectionPlan(groups=groups, n_samples=4, draw_size=groups)
    return RolloutCollector(client, PromptSource(PROMPTS, shuffle=False, seed=1), plan, SAMPLING, grade=right_if_first)


async def test_the_others_of_its_group_are_compared_without_it(embedded: EngineUnderTest) -> None:
    async with generating(embedded, generate_functions.fails_at_the_second) as client:
        rollout = await collector_of(client, 2).collect(SeedStream(7, ()), "1")
        counters = client.counters
    for start in (0, 4):
        found = advantages(rollout, CONFIG)[start : start + 4]
        assert found[1] == 0
        assert found[2] == found[3] < 0 < found[0]
        assert found[0] + found[2] + found[3] == pytest.approx(0)
    values = rollout_metrics(1, rollout, counters)
    assert values["custom_generate_failed"] == 2
    assert values["reward"] == pytest.approx(1 / 3)
    assert [sample.response_length for sample in with_advantages(rollout, CONFIG)][1::4] == [0, 0]
    records = sample_records(rollout, CONFIG)
    assert [record.grade for record in records[:2]] == ["graded", "left_out"]
    assert records[1].mean_log_prob is None


async def test_a_reward_of_the_environment_is_the_reward(embedded: EngineUnderTest) -> None:
    """The grader is asked for the others alone, and a checkpoint keeps it."""

    async def rewards(sample: Sample, engine: Any, settings: Any) -> None:
        await engine.generate()
        if sample.index % 2:
            sample.reward = 0.25 * sample.index

    async with generating(embedded, rewards) as client:
        group = restored(await made(client))
    with Grader(REWARD_RULES[RewardType.DAPO]) as grader:
        await grade_group(grader, group)
        assert sum(grader.collect_counts().values()) == 2
    assert [sample.reward for sample in group.samples] == [-1.0, 0.25, -1.0, 0.75]
    for sample in group.samples:
        sample.reward = 1.0
    await grade_group(None, group)
    group.samples[2].grade = None
    with pytest.raises(UserError, match=r"has given sample 2 no reward: let it set sample\.reward, or give --rm-type"):
        await grade_group(None, group)


async def test_a_function_that_always_fails_ends_the_run(embedded: EngineUnderTest) -> None:
    async with generating(embedded, generate_functions.raises) as client:
        with pytest.raises(UserError, match=r"no sample of a rollout could be generated, .* ZeroDivisionError"):
            await collector_of(client, 2).collect(SeedStream(7, ()), "1")


async def test_an_evaluation_is_generated_by_it_too(embedded: EngineUnderTest) -> None:
    async with generating(embedded, Tool().generate) as client:
        rollout = await generate_rollout(
            client, PROMPTS[:2], n_samples=2, sampling=SAMPLING, seeds=SeedStream(7, ()), expected_version="1"
        )
    assert {sample.turns for group in rollout.groups for sample in group.samples} == {3}


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_such_module:generate", "the module cannot be imported"),
        ("generate_functions:missing", "generate_functions has no function missing"),
        ("generate_functions:is_not_async", "is not an async function: write it as `async def generate"),
        ("generate_functions:takes_two", "cannot be called as `async def generate.*too many positional arguments"),
    ],
)
def test_a_function_of_another_form_is_refused_before_anything_starts(path: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"--custom-generate-function-path {path}.*{problem}"):
        load_generate_function(path)
