"""Rollouts against the embedded engine: filtered, refilled, aborted and continued."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rollout_support import EngineUnderTest, load_reference, log_probs_of, make_prompt

from recipe.data.source import PromptSource
from recipe.data.tokenizer import load_tokenizer
from recipe.generation.custom_generate import Generation
from recipe.generation.turns import Codec
from recipe.rewards import Grade
from recipe.rewards.grader import GradeStatus
from recipe.rollout.client import ClientOptions, RolloutClient
from recipe.rollout.collect import CollectionPlan, NothingToLearn, RolloutCollector
from recipe.rollout.filters import check_reward_nonzero_std
from recipe.rollout.generate import Rollout, SeedStream
from recipe.rollout.pending import PendingGroup
from recipe.sampling.errors import StaleWeights
from recipe.sampling.sample import FinishReason, Sample, SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError

PROMPTS = [make_prompt(number, (number + 1, 2, 3)) for number in range(40)]
SAMPLING = SamplingParams(max_new_tokens=10)
PLAN = CollectionPlan(groups=3, n_samples=3, draw_size=3)


def reward_of(sample: Sample) -> float:
    """Equal for many a group of three, and different for others."""
    return float(sample.response_ids[0] % 3 == 0)


async def grade(group: SampleGroup) -> None:
    for sample in group.samples:
        sample.grade = Grade(reward_of(sample), GradeStatus.GRADED, None, "")


class Collectors:
    """Makes collectors over one client, each with a source of its own."""

    def __init__(self, client: RolloutClient, checkpoint: Path) -> None:
        self.client = client
        self.decode: Callable = Codec(load_tokenizer(checkpoint)).decode

    def make(self, plan: CollectionPlan = PLAN, sampling: SamplingParams = SAMPLING, **others) -> RolloutCollector:
        self.source = PromptSource(PROMPTS, shuffle=True, seed=2)
        options = {"grade": grade, "keep": check_reward_nonzero_std, **others}
        return RolloutCollector(self.client, self.source, plan, sampling, **options)


@pytest.fixture
async def collectors(embedded: EngineUnderTest) -> AsyncIterator[Collectors]:
    generation = Generation(codec=Codec(load_tokenizer(embedded.checkpoint)))
    async with RolloutClient([embedded.url], ClientOptions(generation=generation)) as client:
        yield Collectors(client, embedded.checkpoint)


def seeds(rollout: int) -> SeedStream:
    return SeedStream(7, ("rollout", rollout))


def content(group: SampleGroup) -> list[object]:
    return [
        (s.index, s.prompt.index, s.response_ids, s.rollout_log_probs, s.response, s.finish_reason, s.loss_mask)
        for s in group.samples
    ]


def contents(rollout: Rollout) -> list[object]:
    return [content(group) for group in rollout.groups]


async def test_groups_of_equal_reward_are_replaced_and_it_repeats_though_others_finish_first(
    collectors: Collectors,
) -> None:
    rollouts = []
    for hurry in (False, True):

        async def grade_late(group: SampleGroup, hurry: bool = hurry) -> None:
            await asyncio.sleep(0.02 * (group.index % 4) if hurry else 0.06 - 0.02 * (group.index % 4))
            await grade(group)

        collector = collectors.make(grade=grade_late)
        rollouts.append([await collector.collect(seeds(number), "1") for number in range(3)])
    first, second = rollouts
    assert [contents(rollout) for rollout in first] == [contents(rollout) for rollout in second]
    assert [rollout.sampling for rollout in first] == [rollout.sampling for rollout in second]
    assert sum(rollout.sampling.refills for rollout in first) > 0
    assert sum(rollout.sampling.dropped_groups for rollout in first) > 0
    for rollout in first:
        assert len(rollout.groups) == 3
        assert all(check_reward_nonzero_std(group) for group in rollout.groups)


async def test_every_draw_is_kept_dropped_or_drawn_again(collectors: Collectors) -> None:
    kept: list[int] = []
    dropped = 0
    collector = collectors.make()
    for number in range(4):
        rollout = await collector.collect(seeds(number), "1")
        kept += [group.index for group in rollout.groups]
        dropped += rollout.sampling.dropped_groups
    assert kept == sorted(set(kept))
    assert kept[-1] + 1 == len(kept) + dropped
    assert collectors.source.draw(1)[0].number == kept[-1] + 1


async def test_a_resumed_run_collects_what_the_uninterrupted_one_does(collectors: Collectors) -> None:
    collector = collectors.make()
    expected = [contents(await collector.collect(seeds(number), "1")) for number in range(3)]
    stopped = collectors.make()
    await stopped.collect(seeds(0), "1")
    state = json.loads(json.dumps((collectors.source.state_dict(), stopped.state())))
    resumed = collectors.make()
    collectors.source.load_state_dict(state[0])
    resumed.load_state(state[1])
    assert [contents(await resumed.collect(seeds(number), "1")) for number in (1, 2)] == expected[1:]


async def test_where_nothing_varies_the_run_stops_with_the_counts(collectors: Collectors) -> None:
    async def always_right(group: SampleGroup) -> None:
        for sample in group.samples:
            sample.grade = Grade(1.0, GradeStatus.GRADED, None, "")

    collector = collectors.make(replace(PLAN, max_refills=2), grade=always_right)
    with pytest.raises(NothingToLearn, match=r"dropped (\d) of 9 groups \(\1 with reward 1.0 throughout\) in 3 draws"):
        await collector.collect(seeds(0), "1")


LONG = SamplingParams(max_new_tokens=55, stop_token_ids=())


@asynccontextmanager
async def cut_short(embedded: EngineUnderTest, group: SampleGroup, sampling: SamplingParams = LONG) -> AsyncIterator:
    """A client that has made a part of the group's responses, whose seeds are 5, 6, ..."""
    seeds = range(5, 5 + len(group.samples))
    async with RolloutClient([embedded.url]) as client:
        for attempt in range(40):
            task = asyncio.create_task(client.generate(group, sampling, seeds))
            await asyncio.sleep(0.01 * 1.15**attempt)
            await client.drain()
            await task
            if all(sample.response_ids and not sample.is_finished for sample in group.samples):
                break
            for sample in group.samples:
                sample.cut(0)
                sample.finish_reason = None
        else:
            pytest.fail("the engine was never stopped midway")
        yield client


async def test_a_continued_sample_is_what_it_would_be_without_the_pause(embedded: EngineUnderTest) -> None:
    sampling = replace(LONG, max_new_tokens=50)
    whole, parts = (SampleGroup.of(PROMPTS[0], 0, 4) for _ in range(2))
    async with cut_short(embedded, parts, sampling) as client:
        await client.generate(parts, sampling, range(5, 9))
        await client.generate(whole, sampling, range(5, 9))
    assert [s.response_ids for s in parts.samples] == [s.response_ids for s in whole.samples]
    for part, one in zip(parts.samples, whole.samples, strict=True):
        assert part.rollout_log_probs == pytest.approx(one.rollout_log_probs, abs=1e-4)
        assert part.finish_reason is one.finish_reason


async def test_tokens_keep_the_log_probs_and_versions_of_the_weights_that_made_them(
    embedded: EngineUnderTest, other_checkpoint: Path
) -> None:
    group = SampleGroup.of(PROMPTS[0], 0, 2)
    async with cut_short(embedded, group) as client:
        borders = [sample.response_length for sample in group.samples]
        embedded.load(other_checkpoint, "2")
        await client.generate(group, LONG, range(5, 7))
    models = embedded.reference, load_reference(other_checkpoint)
    for sample, border in zip(group.samples, borders, strict=True):
        assert sample.weight_versions == ["1"] * border + ["2"] * (sample.response_length - border)
        first, second = (log_probs_of(model, sample.tokens)[len(sample.prompt_ids) - 1 :] for model in models)
        expected = torch.cat([first[:border], second[border:]])
        torch.testing.assert_close(torch.tensor(sample.rollout_log_probs), expected, atol=1e-3, rtol=0)


# Lengths that differ, so that one group finishes while others are under way.
VARIED = SamplingParams(max_new_tokens=55, stop_token_ids=tuple(range(0, 512, 16)))
FIRST_OF_FOUR = CollectionPlan(groups=1, n_samples=4, draw_size=4, in_order=False, partial=True)


async def waiting_groups(collectors: Collectors, plan: CollectionPlan = FIRST_OF_FOUR) -> tuple[Rollout, list[dict]]:
    """A rollout for which others were aborted, and those, as a checkpoint keeps them."""
    for _ in range(20):
        collector = collectors.make(plan, VARIED, keep=None)
        rollout = await collector.collect(seeds(0), "1")
        waiting = json.loads(json.dumps(collector.state()))
        samples = [state for group in waiting for state in group["samples"]]
        aborted = [state for state in samples if state["finish_reason"] == "abort" and state["ids"]]
        if 0 < len(aborted) < len(samples):
            return rollout, waiting
    pytest.fail("no group was ever aborted midway")


async def continued(collectors: Collectors, waiting: list[dict], **plan: bool) -> Rollout:
    """All waiting groups, continued after a resume."""
    count = len(waiting)
    collector = collectors.make(replace(FIRST_OF_FOUR, groups=count, draw_size=count, **plan), VARIED, keep=None)
    collector.load_state(waiting)
    rollout = await collector.collect(seeds(1), "2")
    assert collector.state() == []
    return rollout


@pytest.fixture
async def updated(
    collectors: Collectors, embedded: EngineUnderTest, other_checkpoint: Path
) -> tuple[list[int], list[dict]]:
    """Draws that were kept under the first weights, and the groups that wait. The engine has the second weights."""
    rollout, waiting = await waiting_groups(collectors)
    embedded.load(other_checkpoint, "2")
    return [group.index for group in rollout.groups], waiting


async def test_waiting_groups_survive_a_checkpoint_and_go_on_first(
    collectors: Collectors, updated: tuple[list[int], list[dict]]
) -> None:
    kept, waiting = updated
    before = [PendingGroup.from_json(state, collectors.source.prompt_of).group for state in waiting]
    rollout, again = await continued(collectors, waiting), await continued(collectors, waiting)
    assert contents(rollout) == contents(again)
    assert not {group.index for group in rollout.groups} & set(kept)
    stale = 0
    finished = [state["finish_reason"] in ("stop", "length") for group in waiting for state in group["samples"]]
    lengths = [sample.response_length for group in before for sample in group.samples]
    samples = [sample for group in rollout.groups for sample in group.samples]
    for is_finished, length, sample in zip(finished, lengths, samples, strict=True):
        assert is_finished == (sample.response_length == length)
    for old, new in zip(before, rollout.groups, strict=True):
        assert (new.index, new.prompt) == (old.index, old.prompt)
        for first, whole in zip(old.samples, new.samples, strict=True):
            border = first.response_length
            assert whole.is_finished
            assert whole.response_ids[:border] == first.response_ids
            assert whole.rollout_log_probs[:border] == first.rollout_log_probs
            assert whole.weight_versions == ["1"] * border + ["2"] * (whole.response_length - border)
            assert whole.loss_mask == [1] * whole.response_length
            assert whole.response == text_of(whole, collectors.decode)
            stale += border
    assert rollout.metrics.stale_tokens == stale > 0
    made_now = rollout.metrics.response_tokens - stale
    assert rollout.metrics.tokens_per_second == pytest.approx(made_now / rollout.metrics.seconds)


def text_of(sample: Sample, decode: Callable) -> str:
    ends = isinstance(sample.matched, int)
    return decode(sample.response_ids[:-1] if ends else sample.response_ids)


async def test_a_resume_with_other_groups_than_those_that_wait_is_refused(collectors: Collectors) -> None:
    """Their samples' numbers would be others' too."""
    _, waiting = await waiting_groups(collectors)
    collector = collectors.make(replace(FIRST_OF_FOUR, n_samples=2), VARIED, keep=None)
    with pytest.raises(
        UserError, match=r"\d groups of 4 samples wait .* --n-samples-per-prompt is 2: resume with .* 4"
    ):
        collector.load_state(waiting)


async def test_a_filter_does_not_stop_the_rest_of_the_rollout(collectors: Collectors) -> None:
    """Engines are watched meanwhile, and may be replaced."""
    goes_on = threading.Event()
    asyncio.get_running_loop().call_later(0.05, goes_on.set)
    rollout = await collectors.make(keep=lambda _: goes_on.wait(60)).collect(seeds(0), "1")
    assert rollout.sampling.dropped_groups == 0


async def test_older_tokens_can_be_left_out_of_training(
    collectors: Collectors, updated: tuple[list[int], list[dict]]
) -> None:
    rollout = await continued(collectors, updated[1], mask_older=True)
    samples = [sample for group in rollout.groups for sample in group.samples]
    for sample in samples:
        assert sample.loss_mask == [int(version == "2") for version in sample.weight_versions]
    assert {0, 1} == {mask for sample in samples for mask in sample.loss_mask}


async def test_without_partial_rollouts_aborted_samples_are_made_anew(collectors: Collectors) -> None:
    collector = collectors.make(replace(FIRST_OF_FOUR, partial=False), VARIED, keep=None)
    rollout = await collector.collect(seeds(0), "1")
    assert collector.state() == []
    kept = rollout.groups[0].index
    assert [draw.number for draw in collectors.source.draw(4)] == [n for n in range(5) if n != kept]
    assert rollout.sampling.unused_groups == 3


async def test_new_tokens_of_a_continued_sample_must_be_of_the_current_weights(collectors: Collectors) -> None:
    _, waiting = await waiting_groups(collectors)
    with pytest.raises(StaleWeights, match="version 1, but this rollout is for version 2"):
        await continued(collectors, waiting)


async def test_a_stop_string_over_the_border_ends_a_continued_response(collectors: Collectors) -> None:
    """The stop string is made of the text on both sides of the border; the engine sees one side only."""
    collectors.make()
    prompt = collectors.source.prompt_of(0)
    whole, expected, part = SampleGroup.of(prompt, 0, 8), SampleGroup.of(prompt, 0, 1), SampleGroup.of(prompt, 0, 1)
    await collectors.client.generate(whole, LONG, range(8))
    source = max(whole.samples, key=lambda sample: sample.response_length)
    ids, seed = source.response_ids, source.index
    text_before = [collectors.decode(ids[:length]) for length in range(len(ids))]
    border, stop = next(
        (length, stop)
        for length in range(3, len(ids) - 1)
        if len(stop := collectors.decode(ids[length - 1 : length + 1])) > 1 and stop not in text_before[length]
    )
    sampling = replace(LONG, stop=(stop,))
    await collectors.client.generate(expected, sampling, [seed])
    [sample] = part.samples
    sample.append_model(ids[:border], source.rollout_log_probs[:border], ["0"] * border)
    sample.finish_reason = FinishReason.ABORT
    collector = collectors.make(replace(FIRST_OF_FOUR, draw_size=1, n_samples=1), sampling, keep=None)
    collector.load_state([json.loads(json.dumps(PendingGroup(part, (seed,)).as_json()))])
    rollout = await collector.collect(seeds(1), "1")
    [continued_sample], [one_piece] = rollout.groups[0].samples, expected.samples
    assert continued_sample.response_ids == one_piece.response_ids == ids[: border + 1]
    assert continued_sample.response == one_piece.response
    assert continued_sample.finish_reason is FinishReason.STOP
    assert continued_sample.matched == one_piece.matched == stop
    assert len(continued_sample.rollout_log_probs) == len(continued_sample.loss_mask) == border + 1
