"""Weights are replaced while responses are under way: between two tokens, each of which tells whose weights made it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_support import CONTEXT, weights_of

from recipe.config import Architecture
from recipe.engines.embedded.forward import RowModel
from recipe.engines.embedded.fused import FusedModel
from recipe.engines.embedded.generation import Generation
from recipe.engines.embedded.protocol import GenerateBody, Limits, answer, read_sequences
from recipe.engines.embedded.running_sequence import RunningSequence
from recipe.engines.embedded.weights import WeightTable
from recipe.sampling.sampling_params import SamplingParams
from recipe.sampling.sglang_response import SampleAnswer, read_sample

Prompts = list[list[int]]
held_weights = cache(weights_of)


@dataclass
class Steps:
    """An engine without its thread and its server: a test says when it makes a token."""

    generation: Generation
    table: WeightTable
    limits: Limits
    finished: list[RunningSequence]

    def begin(self, prompts: Prompts, sampling: SamplingParams, seeds: list[int], made: int = 0) -> None:
        """Takes requests, of whose responses `made` tokens are in the prompts already."""
        params = [sampling.request(seed, made) for seed in seeds]
        body = GenerateBody.model_validate({"input_ids": prompts, "sampling_params": params, "return_logprob": True})
        self.generation.waiting.extend(read_sequences(body, self.limits))

    @torch.inference_mode()
    def step(self, tokens: int = CONTEXT) -> None:
        """Makes so many tokens of every sequence, or as many as it has."""
        for _ in range(tokens):
            if self.generation.running:
                self.generation.decode()
            elif self.generation.waiting:
                self.generation.admit()

    @torch.inference_mode()
    def update(self, checkpoint: Path, version: str, *, recompute: bool) -> None:
        if recompute:
            self.generation.retract()
        self.table.replace(held_weights(checkpoint).items())
        self.generation.change_version(version)

    def results(self) -> list[SampleAnswer]:
        """Of the finished sequences, in the order of their seeds."""
        done = sorted(self.finished, key=lambda sequence: sequence.sampling.seed)
        self.finished.clear()
        return [read_sample(answer(sequence, None)) for sequence in done]


@pytest.fixture(scope="module")
def steps(checkpoint: Path) -> Steps:
    fused = FusedModel(Architecture.from_checkpoint(checkpoint))
    model, table, finished = RowModel(fused, CONTEXT), WeightTable(fused), list[RunningSequence]()
    table.replace_all(checkpoint)
    generation = Generation(model, 16, "1", lambda ids: "".join(f"<{token}>" for token in ids), finished.append)
    limits = Limits(model.vocab_size, CONTEXT, (), None)
    return Steps(generation, table, limits, finished)


PROMPTS = st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=20), min_size=1, max_size=3)
LENGTH = 24


@settings(max_examples=12, deadline=None)
@given(
    prompts=PROMPTS, copies=st.integers(1, 3), border=st.integers(1, LENGTH - 1), temperature=st.sampled_from([0, 1])
)
def test_a_recomputed_response_goes_on_as_if_new_weights_were_given_the_tokens(
    steps: Steps,
    checkpoint: Path,
    other_checkpoint: Path,
    prompts: Prompts,
    copies: int,
    border: int,
    temperature: float,
) -> None:
    """To the bit: what follows is what an engine with the new weights makes of prompt and tokens so far."""
    prompts, sampling = prompts * copies, SamplingParams(max_new_tokens=LENGTH, temperature=temperature)
    seeds = list(range(len(prompts)))
    steps.update(checkpoint, "1", recompute=False)
    steps.begin(prompts, sampling, seeds)
    steps.step()
    undisturbed = steps.results()
    steps.begin(prompts, sampling, seeds)
    steps.step(border)
    steps.update(other_checkpoint, "2", recompute=True)
    steps.step()
    found = steps.results()
    begun = [prompt + result.ids[:border] for prompt, result in zip(prompts, found, strict=True)]
    steps.begin(begun, sampling, seeds, made=border)
    steps.step()
    for before, result, after in zip(undisturbed, found, steps.results(), strict=True):
        assert result.ids == before.ids[:border] + after.ids
        assert result.log_probs == before.log_probs[:border] + after.log_probs
        assert result.versions == ["1"] * border + ["2"] * (LENGTH - border)
        assert result.finish_reason == after.finish_reason


def test_several_updates_are_told_apart_and_a_short_response_ends_before_them(
    steps: Steps, checkpoint: Path, other_checkpoint: Path
) -> None:
    steps.update(checkpoint, "1", recompute=False)
    steps.begin([[5, 6]], SamplingParams(max_new_tokens=3), [0])
    steps.begin([[5, 6], [7]], SamplingParams(max_new_tokens=12), [1, 2])
    steps.step(4)
    steps.update(other_checkpoint, "2", recompute=False)
    steps.update(checkpoint, "3", recompute=True)
    steps.step(2)
    steps.update(checkpoint, "3", recompute=True)
    steps.begin([[9]], SamplingParams(max_new_tokens=2), [3])
    steps.update(other_checkpoint, "4", recompute=True)
    steps.step()
    short, *long, late = steps.results()
    assert short.versions == ["1"] * 3
    assert [result.versions for result in long] == [["1"] * 4 + ["3"] * 2 + ["4"] * 6] * 2
    assert late.versions == ["4"] * 2


def test_what_waits_to_be_read_again_is_told_when_it_is_aborted(
    steps: Steps, checkpoint: Path, other_checkpoint: Path
) -> None:
    steps.update(checkpoint, "1", recompute=False)
    steps.begin([[5, 6]], SamplingParams(max_new_tokens=12), [0])
    steps.step(5)
    steps.update(other_checkpoint, "2", recompute=True)
    steps.generation.abort(lambda _: True)
    [result] = steps.results()
    assert (len(result.ids), len(result.log_probs)) == (5, 5)
    assert result.versions == ["1"] * 5
