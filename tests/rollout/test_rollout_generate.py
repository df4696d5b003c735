"""A rollout: in the prompts' order, seeded by name, of one weight version, graded as it completes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext

import pytest
from fake_engines import group_of
from rollout_support import EngineUnderTest, make_prompt

from recipe.config import EvalConfig, RolloutConfig
from recipe.rollout.client import ClientCounters, ClientOptions, RolloutClient
from recipe.rollout.generate import Rollout, SeedStream, check_versions, generate_rollout
from recipe.sampling.errors import EngineError, StaleWeights
from recipe.sampling.sample import SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.seeds import derive

PROMPTS = [make_prompt(number, tuple(range(number + 1, 2 * number + 3))) for number in range(6)]
SAMPLING = SamplingParams(max_new_tokens=8)


@pytest.fixture
async def client(embedded: EngineUnderTest) -> AsyncIterator[RolloutClient]:
    async with RolloutClient([embedded.url]) as client:
        yield client


async def _rollout(
    client: RolloutClient, number: int = 0, version: str = "1", sampling: SamplingParams = SAMPLING
) -> Rollout:
    stream = SeedStream(7, ("rollout", number))
    return await generate_rollout(
        client, PROMPTS, n_samples=4, sampling=sampling, seeds=stream, expected_version=version
    )


def _content(rollout: Rollout) -> list[object]:
    return [
        (sample.index, sample.response_ids, sample.rollout_log_probs, sample.response, sample.finish_reason)
        for group in rollout.groups
        for sample in group.samples
    ]


async def test_a_rollout_repeats_exactly_and_another_differs(client: RolloutClient) -> None:
    first, again, second = await _rollout(client), await _rollout(client), await _rollout(client, 1)
    assert _content(first) == _content(again)
    assert [group.prompt for group in first.groups] == PROMPTS
    assert [sample.index for group in second.groups for sample in group.samples] == list(range(24))
    assert [s.response_ids for g in first.groups for s in g.samples] != [
        s.response_ids for g in second.groups for s in g.samples
    ]


async def test_metrics_count_what_was_made(client: RolloutClient) -> None:
    rollout = await _rollout(client)
    samples = [sample for group in rollout.groups for sample in group.samples]
    metrics = rollout.metrics
    assert metrics.samples == 24
    assert metrics.prompt_tokens == sum(len(prompt.ids) for prompt in PROMPTS)
    assert metrics.response_tokens == sum(len(sample.response_ids) for sample in samples)
    assert metrics.truncated_share == sum(sample.truncated for sample in samples) / 24
    assert metrics.tokens_per_second == pytest.approx(metrics.response_tokens / metrics.seconds)
    assert metrics.counters == ClientCounters()


async def test_another_weight_version_stops_the_run(client: RolloutClient) -> None:
    with pytest.raises(StaleWeights, match=r"version 1, but this rollout is for version 2"):
        await _rollout(client, version="2")


async def test_groups_are_graded_as_they_complete_and_progress_is_told(client: RolloutClient) -> None:
    graded: list[int] = []
    told: list[tuple[int, int]] = []

    async def grade(group: SampleGroup) -> None:
        await asyncio.sleep(0.01)
        graded.append(group.index)

    await generate_rollout(
        client,
        PROMPTS,
        n_samples=2,
        sampling=SAMPLING,
        seeds=SeedStream(7, ("eval", "aime")),
        expected_version="1",
        on_group=grade,
        progress=lambda done, total: told.append((done, total)),
    )
    assert sorted(graded) == list(range(6))
    assert told == [(done, 6) for done in range(1, 7)]


async def test_an_error_in_grading_ends_the_rollout(client: RolloutClient, embedded: EngineUnderTest) -> None:
    async def grade(_: SampleGroup) -> None:
        raise ZeroDivisionError

    stream = SeedStream(7, ())
    with pytest.raises(ZeroDivisionError):
        await generate_rollout(
            client, PROMPTS, n_samples=2, sampling=SAMPLING, seeds=stream, expected_version="1", on_group=grade
        )
    assert embedded.generate_one([1], SAMPLING)["output_ids"]


async def test_an_aborted_sample_is_an_error(client: RolloutClient, embedded: EngineUnderTest) -> None:
    async def until_aborted() -> None:
        for _ in range(20):  # a rollout may be over before the engine is told
            task = asyncio.create_task(_rollout(client, sampling=SamplingParams(max_new_tokens=50)))
            while not task.done():
                await asyncio.to_thread(embedded.post, "/abort_request", {"abort_all": True})
            await task

    with pytest.raises(EngineError, match="aborted"):
        await until_aborted()


def test_seeds_are_named() -> None:
    assert SeedStream(1234, ("rollout", 5)).sample_seed(2, 3) == derive(1234, "rollout", 5, 2, 3)


def test_evaluation_samples_as_training_where_nothing_else_is_said() -> None:
    rollout = RolloutConfig(
        num_rollout=1,
        rollout_batch_size=1,
        rollout_max_response_len=100,
        rollout_top_p=0.9,
        rollout_stop=("END",),
        rollout_max_concurrency=7,
    )
    training = SamplingParams.for_rollout(rollout)
    assert training == SamplingParams(100, top_p=0.9, stop=("END",))
    assert SamplingParams.for_evaluation(EvalConfig(), rollout) == training
    changed = SamplingParams.for_evaluation(EvalConfig(eval_temperature=0.0, eval_max_response_len=5), rollout)
    assert changed == SamplingParams(5, temperature=0.0, top_p=0.9, stop=("END",))
    assert ClientOptions.of(rollout, 112).max_concurrency == 7


@pytest.mark.parametrize(("version", "fits"), [("7", False), ("6", True), ("5", True), ("4", True), ("3", False)])
def test_a_token_may_be_so_many_versions_old_and_never_newer(version: str, fits: bool) -> None:
    group = group_of(n_samples=1)
    group.samples[0].append_model([1, 2], [-0.5, -0.5], ["6", version])
    with nullcontext() if fits else pytest.raises(StaleWeights, match="is for version 6 or 2 before it"):
        check_versions(group, "6", max_staleness=2)
