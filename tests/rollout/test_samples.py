"""Tokens, mask, log-probs and versions of a sample stay aligned."""

import pytest
from rollout_support import make_prompt

from recipe.rollout.client import ClientCounters
from recipe.rollout.generate import GenerationMetrics
from recipe.sampling.errors import EngineAnswerError
from recipe.sampling.sample import NO_WEIGHTS, FinishReason, Sample, SampleGroup
from recipe.sampling.sglang_response import read_sample, read_samples


def test_append_keeps_the_lists_aligned() -> None:
    sample = Sample(0, 0, make_prompt(0, (1, 2)))
    sample.append_model([5, 6], [-0.1, -0.2], ["1", "1"])
    sample.finish_reason, sample.matched = FinishReason.STOP, 6
    sample.append_environment([7])
    assert (sample.finish_reason, sample.matched) == (None, None), "the response goes on"
    sample.append_model([8], [-0.3], ["2"])
    assert sample.tokens == [1, 2, 5, 6, 7, 8]
    assert sample.loss_mask == [1, 1, 0, 1]
    assert sample.rollout_log_probs == [-0.1, -0.2, 0.0, -0.3]
    assert sample.weight_versions == ["1", "1", NO_WEIGHTS, "2"]
    assert (sample.length, sample.response_length, sample.generated_length) == (6, 4, 3)


@pytest.mark.parametrize(("ids", "log_probs", "versions"), [([1], [], ["1"]), ([], [0.0], []), ([1], [0.0], [])])
def test_append_of_unequal_lists_changes_nothing(ids: list[int], log_probs: list[float], versions: list[str]) -> None:
    sample = Sample(0, 0, make_prompt(0, (1,)))
    with pytest.raises(ValueError, match="sample 0"):
        sample.append_model(ids, log_probs, versions)
    assert (sample.response_ids, sample.loss_mask, sample.rollout_log_probs, sample.weight_versions) == ([], [], [], [])


def test_groups_number_their_samples_uniquely() -> None:
    groups = [SampleGroup.of(make_prompt(7, (1,)), index, 4) for index in (2, 3)]
    assert [sample.index for group in groups for sample in group.samples] == list(range(8, 16))
    assert {sample.group_index for sample in groups[1].samples} == {3}


def _answer(**meta: object) -> dict[str, object]:
    return {
        "text": "ab",
        "output_ids": [5, 6, 7],
        "meta_info": {
            "finish_reason": {"type": "length", "length": 3},
            "weight_version": "2",
            "output_token_logprobs": [[-0.5, 5, None], [-0.25, 6, None], [-1.0, 7, None]],
            **meta,
        },
    }


def test_every_token_has_the_version_of_its_span() -> None:
    spans = [{"version": "1", "start": 0, "end": 2}, {"version": "2", "start": 2, "end": 3}]
    result = read_sample(_answer(weight_versions=spans))
    assert result.versions == ["1", "1", "2"]
    assert result.log_probs == [-0.5, -0.25, -1.0]
    assert result.finish_reason is FinishReason.LENGTH
    assert read_sample(_answer()).versions == ["2"] * 3


@pytest.mark.parametrize(
    "answer",
    [
        {},
        _answer(output_token_logprobs=[[-0.5, 5, None]]),
        _answer(finish_reason={"type": "tired"}),
        _answer(finish_reason=None),
        _answer(weight_version=None),
        _answer(weight_version=2),
        _answer(weight_versions=[{"version": "2", "start": 0, "end": 3}, {"version": "2", "start": 5, "end": 9}]),
        _answer(weight_versions=[{"version": "2", "start": -1, "end": 3}]),
        _answer(output_token_logprobs=[[float("nan"), 5], [-0.25, 6], [-1.0, 7]]),
        _answer(output_token_logprobs=[["-0.5", 5], [-0.25, 6], [-1.0, 7]]),
        _answer(output_token_logprobs=[[], [-0.25, 6], [-1.0, 7]]),
        _answer() | {"output_ids": [5, -6, 7]},
        _answer() | {"output_ids": [5, 6.0, 7]},
        _answer() | {"output_ids": [5, "6" * 5000, 7]},
        _answer() | {"output_ids": 3},
        _answer() | {"meta_info": []},
        [],
    ],
)
def test_an_answer_that_is_not_sglangs_is_an_error(answer: dict[str, object]) -> None:
    with pytest.raises(EngineAnswerError) as refused:
        read_sample(answer)
    assert len(str(refused.value)) < 300


def test_tokens_outside_the_vocabulary_are_no_answer() -> None:
    assert len(read_samples([_answer()], [3], vocab_size=8)) == 1
    with pytest.raises(EngineAnswerError, match="the token id 7, outside the vocabulary of 7"):
        read_samples([_answer()], [3], vocab_size=7)


@pytest.mark.parametrize("more", [{}, {"output_ids": []}])
def test_what_sglang_aborts_before_it_reads_the_prompt_has_no_tokens(more: dict) -> None:
    meta = {"id": "0", "finish_reason": {"type": "abort", "message": "Abort before prefill"}, "prompt_tokens": 0}
    result = read_sample({"text": "", "meta_info": meta, **more})
    assert result.finish_reason is FinishReason.ABORT
    assert (result.ids, result.log_probs, result.versions) == ([], [], [])


@pytest.mark.parametrize(("told", "kept"), [(0, 0), (2, 2), (3, 3)])
def test_of_an_aborted_sample_the_tokens_are_kept_whose_log_probs_are_known(told: int, kept: int) -> None:
    meta: dict[str, object] = {"finish_reason": {"type": "abort", "message": "Abort"}, "weight_version": "4"}
    if told:
        meta["output_token_logprobs"] = [[-0.5, token, None] for token in (5, 6, 7)[:told]]
    result = read_sample({"text": "abc", "output_ids": [5, 6, 7], "meta_info": meta})
    assert result.ids == [5, 6, 7][:kept]
    assert result.log_probs == [-0.5] * kept
    assert result.versions == ["4"] * kept
    assert result.text == ("abc" if kept == 3 else "")


def test_accepted_drafts_are_counted_over_pieces_samples_and_depths() -> None:
    """Ten steps: four without a draft token accepted, three with one, three with two."""
    samples = SampleGroup.of(make_prompt(0, (1,)), 0, 2)
    for sample, pieces in zip(samples.samples, ([[2, 1], [1, 1, 1]], [[1, 1, 2]]), strict=True):
        for piece in pieces:
            answer = read_sample(_answer(spec_correct_drafts_histogram=piece))
            sample.append_model(answer.ids, answer.log_probs, answer.versions)
            sample.count_drafts(answer.accepted_drafts)
    metrics = GenerationMetrics.of([samples], "2", 1.0, ClientCounters())
    assert metrics.accepted_drafts == (4, 3, 3)
    assert metrics.accept_length == pytest.approx(1 + 9 / 10)
    assert metrics.accept_rates == pytest.approx((0.6, 0.3))
    samples.samples[0].accepted_drafts = samples.samples[1].accepted_drafts = []
    without = GenerationMetrics.of([samples], "2", 1.0, ClientCounters())
    assert (without.accept_length, without.accept_rates) == (None, ())
