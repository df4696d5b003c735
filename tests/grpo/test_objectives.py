"""The objectives beside GRPO: by hand, and beside a second implementation of their equations in fp64."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipe.config.groups_training import GrpoConfig
from recipe.experience import sequence_weights, with_log_probs
from recipe.grpo.advantages import (
    leave_one_out_advantages,
    normalised_over_batch,
    penalise_kl,
    response_advantages,
)
from recipe.grpo.loss import PolicyLossConfig, PolicyLossInputs, Surrogate, policy_loss, sequence_log_ratio
from recipe.messages import Scores, TrainSample
from recipe.system.errors import UserError

pytestmark = pytest.mark.smoke

COUNTS = (4, 1, 6, 0, 3)
"""Trained tokens of the sequences of a pack, each between two that are not trained on."""
GSPO = PolicyLossConfig(surrogate=Surrogate.GSPO, eps_clip=0.05, eps_clip_high=0.07)
CISPO = PolicyLossConfig(surrogate=Surrogate.CISPO, eps_clip=0.2, eps_clip_high=0.28)


def pack(*, apart: float = 0.1, per_token: bool = False) -> tuple[PolicyLossInputs, torch.Tensor]:
    """Inputs, and which sequence a token is of."""
    draw = torch.Generator().manual_seed(0)
    weights = sequence_weights(COUNTS, per_token=per_token)
    sample_of = torch.tensor([number for number, count in enumerate(COUNTS) for _ in range(count + 2)])
    log_probs = -torch.randn(len(sample_of), generator=draw, dtype=torch.float64).abs() - 0.5
    advantages = torch.randn(len(COUNTS), generator=draw, dtype=torch.float64)[sample_of]
    old = log_probs + apart * torch.randn(len(sample_of), generator=draw, dtype=torch.float64)
    trained = [w for count, each in zip(COUNTS, weights, strict=True) for w in [0.0, *[each] * count, 0.0]]
    inputs = PolicyLossInputs(log_probs.requires_grad_(), advantages, torch.tensor(trained), old_log_probs=old)
    return inputs, sample_of


def with_sequences(inputs: PolicyLossInputs, sample_of: torch.Tensor) -> PolicyLossInputs:
    ratio = sequence_log_ratio(inputs, sample_of, torch.tensor(COUNTS), lambda sums: sums)
    return replace(inputs, sequence_log_ratio=ratio)


def gradient_of(loss: torch.Tensor, inputs: PolicyLossInputs) -> torch.Tensor:
    return torch.autograd.grad(loss, inputs.log_probs)[0]


def test_gspo_is_the_clipped_objective_of_whole_sequences() -> None:
    """One ratio a sequence, as the paper writes it, and autograd's gradient of it."""
    inputs, sample_of = pack(apart=0.4)
    found = policy_loss(with_sequences(inputs, sample_of), GSPO)
    terms = []
    assert inputs.old_log_probs is not None
    for number, count in enumerate(COUNTS):
        own = (sample_of == number) & (inputs.weights > 0)
        if count:
            ratio = ((inputs.log_probs - inputs.old_log_probs)[own].sum() / count).exp()
            advantage = inputs.advantages[own][0]
            terms.append(torch.minimum(ratio * advantage, ratio.clamp(0.95, 1.07) * advantage))
    expected = -torch.stack(terms).mean()
    torch.testing.assert_close(found.loss, expected)
    gradient = gradient_of(expected, inputs)
    torch.testing.assert_close(gradient_of(found.loss, inputs), gradient)
    clipped = [bool((gradient[(sample_of == number) & (inputs.weights > 0)] == 0).all()) for number in (0, 1, 2, 4)]
    assert 0 < sum(clipped) < 4, "some sequences are clipped, whole, and others not"


def test_the_parts_of_a_sequence_on_two_ranks_make_one_ratio() -> None:
    inputs, sample_of = pack()
    whole = sequence_log_ratio(inputs, sample_of, torch.tensor(COUNTS), lambda sums: sums)
    assert whole is not None
    sides = [torch.arange(len(sample_of)) % 2 == side for side in (0, 1)]

    def held(side: torch.Tensor) -> PolicyLossInputs:
        assert inputs.old_log_probs is not None
        tensors = (inputs.log_probs[side], inputs.advantages[side], inputs.weights[side], inputs.old_log_probs[side])
        return PolicyLossInputs(*tensors)

    sums: list[torch.Tensor] = []

    def keep(mine: torch.Tensor) -> torch.Tensor:
        sums.append(mine)
        return mine

    for side in sides:
        sequence_log_ratio(held(side), sample_of[side], torch.tensor(COUNTS), keep)
    for side in sides:
        found = sequence_log_ratio(held(side), sample_of[side], torch.tensor(COUNTS), lambda _: sums[0] + sums[1])
        torch.testing.assert_close(found, whole[side])


@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [(1.1, 2.0, 1.1), (1.5, 2.0, 1.28), (0.5, 2.0, 0.8), (1.5, -2.0, 1.28), (0.5, -2.0, 0.8)],
)
def test_cispo_weighs_every_token_by_its_clipped_ratio(ratio: float, advantage: float, weight: float) -> None:
    """And clips none away: PPO's gradient would be zero for two of these."""
    log_probs = torch.tensor([-0.7], dtype=torch.float64).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    inputs = PolicyLossInputs(log_probs, advantage * one, one, old_log_probs=log_probs.detach() - math.log(ratio))
    found = policy_loss(inputs, CISPO)
    assert found.loss.item() == pytest.approx(-weight * advantage * -0.7)
    assert gradient_of(found.loss, inputs).item() == pytest.approx(-weight * advantage)
    assert found.metrics.values()["clip_share"] == float(weight != ratio)


@pytest.mark.parametrize("surrogate", Surrogate)
def test_with_one_step_a_rollout_all_surrogates_have_one_gradient(surrogate: Surrogate) -> None:
    inputs, sample_of = pack()
    inputs = with_sequences(replace(inputs, old_log_probs=None), sample_of)
    assert inputs.sequence_log_ratio is None
    loss = policy_loss(inputs, PolicyLossConfig(surrogate=surrogate)).loss
    torch.testing.assert_close(gradient_of(loss, inputs), -inputs.weights * inputs.advantages)


def test_rloo_takes_off_the_mean_of_the_others() -> None:
    rewards = [1.0, 0.0, 0.0, 0.5]
    expected = [r - statistics.fmean(rewards[:n] + rewards[n + 1 :]) for n, r in enumerate(rewards)]
    assert leave_one_out_advantages(rewards) == pytest.approx(expected)
    assert leave_one_out_advantages([0.1] * 3) == [0.0] * 3
    with pytest.raises(UserError, match="--n-samples-per-prompt"):
        leave_one_out_advantages([1.0])


def test_each_estimator_by_hand() -> None:
    rewards = [1.0, 0.0, 0.0, 0.0]
    expected = {
        "grpo": [1.5, -0.5, -0.5, -0.5],
        "gspo": [1.5, -0.5, -0.5, -0.5],
        "cispo": [1.5, -0.5, -0.5, -0.5],
        "rloo": [1.0, -1 / 3, -1 / 3, -1 / 3],
        "reinforce_plus_plus": rewards,
        "reinforce_plus_plus_baseline": [0.75, -0.25, -0.25, -0.25],
    }
    for estimator, advantages in expected.items():
        found = response_advantages(rewards, estimator, std_normalization=True)  # type: ignore[arg-type]
        assert found == pytest.approx(advantages, rel=1e-4), estimator


def test_a_token_answers_for_the_penalties_after_it() -> None:
    advantages, policy, reference = np.float32([[1, 1, 1], [-1, -2, -3], [-1, -1, -4]])
    found = penalise_kl(advantages, policy, reference, 0.1, to_go=True)
    np.testing.assert_allclose(found, [1.0, 1.0, 0.9], rtol=1e-6)  # log ratios 0, -1, 1; to go 0, 0, 1


def samples_of(rewards: list[float], lengths: list[int]) -> list[TrainSample]:
    return [
        TrainSample(
            index=number,
            tokens=np.arange(2 + length),
            loss_mask=np.arange(length) != 1,
            advantages=np.full(length, reward, dtype=np.float32),
        )
        for number, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
    ]


@pytest.mark.parametrize("estimator", ["reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_reinforce_plus_plus_compares_the_tokens_of_a_whole_rollout(estimator: str) -> None:
    """Each trained token counts, those of long responses more often; so the mean is 0 and the deviation 1."""
    samples = samples_of([1.0, 0.0, 0.0], [5, 2, 3])
    draw = np.random.default_rng(0)
    old, reference = ({s.index: draw.normal(size=s.response_length).astype(np.float32) for s in samples} for _ in "12")
    grpo = GrpoConfig(advantage_estimator=estimator, kl_coef=0.3)  # type: ignore[arg-type]
    found = with_log_probs(samples, Scores(old), Scores(reference), grpo)
    trained = np.concatenate([s.advantages[s.loss_mask] for s in found if s.advantages is not None])
    assert trained.mean() == pytest.approx(0, abs=1e-6)
    assert trained.std() == pytest.approx(1, rel=1e-4)
    raw = [
        penalise_kl(s.advantages, old[s.index], reference[s.index], 0.3, to_go=estimator == "reinforce_plus_plus")
        for s in samples
        if s.advantages is not None
    ]
    flat = np.concatenate([one[s.loss_mask] for one, s in zip(raw, samples, strict=True)])
    np.testing.assert_allclose(trained, (flat - flat.mean()) / flat.std(), rtol=1e-3, atol=1e-5)


def test_equal_advantages_of_a_rollout_teach_nothing() -> None:
    [found] = normalised_over_batch([np.float32([0.3, 0.3, 9.0])], [np.array([True, True, False])])
    assert found.tolist() == [0, 0, 0]


def test_others_keep_their_advantages_without_a_kl() -> None:
    samples = samples_of([1.0, 0.0], [3, 2])
    for estimator in ("grpo", "gspo", "cispo", "rloo"):
        found = with_log_probs(samples, None, None, GrpoConfig(advantage_estimator=estimator))  # type: ignore[arg-type]
        for one, given in zip(found, samples, strict=True):
            assert one.advantages is given.advantages
