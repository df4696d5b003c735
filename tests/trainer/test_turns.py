"""A sample of several turns is learned as what the model said in it, token by token."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from trainer_support import on_ranks, random_checkpoint, random_samples, tiny_config

from recipe.messages import TrainSample

MTP = {"mtp_num_layers": 1, "enable_mtp_training": True}
SPOKEN = np.array([True] * 3 + [False] * 4 + [True] * 2)


def two_turns(index: int, draw: np.random.Generator) -> TrainSample:
    """A prompt of 5 tokens, 3 tokens of the model, 4 of a tool, and 2 of the model."""
    tokens = np.concatenate([np.arange(5), draw.integers(0, 96, len(SPOKEN))])
    floats = [draw.normal(size=len(SPOKEN)).astype(np.float32) for _ in range(2)]
    return TrainSample(index, tokens, SPOKEN, 0.1, 0.1, floats[0], rollout_log_probs=-np.abs(floats[1]))


def turn_of(sample: TrainSample, places: slice) -> TrainSample:
    """A turn as a response of its own, to everything before it."""
    assert sample.advantages is not None
    assert sample.rollout_log_probs is not None
    end = len(sample.prompt) + places.stop
    return replace(
        sample,
        tokens=sample.tokens[:end],
        loss_mask=sample.loss_mask[places],
        advantages=sample.advantages[places],
        rollout_log_probs=sample.rollout_log_probs[places],
    )


def learned(trainer, packs: list[list[TrainSample]]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    from recipe.megatron.step import forward_backward

    trainer.load()
    forward_backward(trainer.replicas, packs, trainer.loss_function)
    gradients = {name: parameter.main_grad.clone() for name, parameter in trainer.chunks[0].named_parameters()}
    return gradients, dict(trainer.train_step(packs).metrics)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp_min(1e-12)
        assert ((found[name] - gradient).abs().max() / scale).item() < 1e-5, name


@pytest.mark.slow
def test_the_gradient_is_that_of_the_turns_one_by_one() -> None:
    """Two samples share a prompt in a pack; every turn alone has what it answers as its prompt.
    The MTP layer is trained too."""
    draw = np.random.default_rng(3)
    samples = [two_turns(index, draw) for index in range(2)]
    turns = [[turn_of(sample, places)] for sample in samples for places in (slice(0, 3), slice(7, 9))]
    config = tiny_config(random_checkpoint(), grpo={"entropy_coef": 0.01, "use_tis": True}, mtp=MTP)
    [(found, of_whole)] = on_ranks(learned, config, [samples])
    [(expected, of_turns)] = on_ranks(learned, config, turns)
    assert_equal(found, expected)
    for name in ("loss", "entropy", "tis_weight", "logprob_diff_mean", "logprob_diff_max", "mtp_loss"):
        assert of_whole[name] == pytest.approx(of_turns[name], rel=1e-5), name


@pytest.mark.slow
def test_a_sample_without_a_response_changes_nothing() -> None:
    """Alone in a pack, and beside others of its prompt."""
    samples = random_samples(4, seed=5)
    silent = [
        TrainSample(10 + number, prompt, np.ones(0, dtype=np.bool_), advantages=empty, rollout_log_probs=empty)
        for number, prompt in enumerate([samples[0].prompt, samples[2].prompt])
        for empty in [np.zeros(0, dtype=np.float32)]
    ]
    samples = [replace(sample, sources=None) for sample in samples]
    config = tiny_config(random_checkpoint(), mtp=MTP)
    [(expected, _)] = on_ranks(learned, config, [samples])
    [(found, _)] = on_ranks(learned, config, [[silent[0], *samples], [silent[1]]])
    assert_equal(found, expected)
