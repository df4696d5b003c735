"""The objectives beside GRPO: by hand, and beside a second implementation of their equations in fp64."""

import math
import statistics
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from recipe.config import Config
from recipe.config.groups_training import GrpoConfig
from recipe.experience import constant_length_scale, optimizer_batches, sequence_weights, with_log_probs
from recipe.grpo.advantages import (
    leave_one_out_advantages,
    normalised_over_batch,
    penalise_kl,
    response_advantages,
)
from recipe.grpo.loss import PolicyLossConfig, PolicyLossInputs, Surrogate, policy_loss
from recipe.grpo.sequences import (
    Sequences,
    check_custom_weights,
    custom_weights,
    engine_log_ratio,
    off_policy_kept,
    sequence_log_ratio,
)
from recipe.messages import Scores, TrainSample
from recipe.system.errors import UserError

pytestmark = pytest.mark.smoke

COUNTS = (4, 1, 6, 0, 3)
"""Trained tokens of the sequences of a pack, each between two that are not trained on."""
ALL = slice(None)
GSPO = PolicyLossConfig(surrogate=Surrogate.GSPO, eps_clip=0.05, eps_clip_high=0.07)
CISPO = PolicyLossConfig(surrogate=Surrogate.CISPO, eps_clip=0.2, eps_clip_high=0.28)


def pack(
    *, apart: float = 0.1, per_token: bool = False, engine: float | None = None
) -> tuple[PolicyLossInputs, torch.Tensor]:
    """Inputs, and which sequence a token is of; `engine`: how far apart the engine's log-probs are."""
    draw = torch.Generator().manual_seed(0)
    weights = sequence_weights(COUNTS, per_token=per_token)
    sample_of = torch.tensor([number for number, count in enumerate(COUNTS) for _ in range(count + 2)])
    log_probs = -torch.randn(len(sample_of), generator=draw, dtype=torch.float64).abs() - 0.5
    advantages = torch.randn(len(COUNTS), generator=draw, dtype=torch.float64)[sample_of]
    old = log_probs + apart * torch.randn(len(sample_of), generator=draw, dtype=torch.float64)
    trained = [w for count, each in zip(COUNTS, weights, strict=True) for w in [0.0, *[each] * count, 0.0]]
    inputs = PolicyLossInputs(log_probs.requires_grad_(), advantages, torch.tensor(trained), old_log_probs=old)
    if engine is not None:
        rollout = old + engine * torch.randn(len(sample_of), generator=draw, dtype=torch.float64)
        inputs = replace(inputs, rollout_log_probs=rollout)
    return inputs, sample_of


def sequences_of(
    sample_of: torch.Tensor, over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums, held: slice = ALL
) -> Sequences:
    """Those of a pack whose tokens `held` are on this rank."""
    lengths = [int((sample_of == number).sum()) for number in range(len(COUNTS))]
    offset_of = torch.cat([torch.arange(length) for length in lengths])
    places = torch.tensor([0, *lengths[:-1]]).cumsum(0)[sample_of] + offset_of
    return Sequences(sample_of[held], places[held], tuple(lengths), torch.tensor(COUNTS), over_ranks)


def with_sequences(inputs: PolicyLossInputs, sample_of: torch.Tensor) -> PolicyLossInputs:
    return replace(inputs, sequence_log_ratio=sequence_log_ratio(inputs, sequences_of(sample_of)))


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


def on_two_ranks(
    inputs: PolicyLossInputs, sample_of: torch.Tensor, compute: Callable[[PolicyLossInputs, Sequences], object]
) -> torch.Tensor:
    """What two ranks compute that have every other token each."""
    sides = [slice(side, None, 2) for side in (0, 1)]
    told: list[list[torch.Tensor]] = [[], []]

    def of_side(side: slice) -> PolicyLossInputs:
        tensors = {one.name: getattr(inputs, one.name) for one in fields(inputs)}
        return PolicyLossInputs(**{name: None if one is None else one[side] for name, one in tensors.items()})

    for rank, side in enumerate(sides):

        def keep(mine: torch.Tensor, rank: int = rank) -> torch.Tensor:
            told[rank].append(mine)
            return mine

        compute(of_side(side), sequences_of(sample_of, keep, side))
    result = torch.empty(len(sample_of), dtype=torch.float64)
    for side in sides:
        sums = iter([one + other for one, other in zip(*told, strict=True)])
        found = compute(of_side(side), sequences_of(sample_of, lambda _, sums=sums: next(sums), side))
        assert isinstance(found, torch.Tensor)
        result[side] = found
    return result


@pytest.mark.parametrize(
    "compute",
    [
        sequence_log_ratio,
        lambda inputs, sequences: engine_log_ratio(inputs, sequences, mean=False),
        lambda inputs, sequences: engine_log_ratio(inputs, sequences, mean=True),
        lambda inputs, sequences: off_policy_kept(inputs, sequences, 0.01),
        lambda inputs, sequences: custom_weights(
            inputs, sequences, lambda trainer, engine, trained: [(one.cumsum(0)) * 0.1 for one in trainer]
        ),
    ],
    ids=["gspo", "sequence", "geometric", "opsm", "custom"],
)
def test_the_parts_of_a_sequence_on_two_ranks_are_one(compute: Callable) -> None:
    inputs, sample_of = pack(engine=0.3)
    whole = compute(inputs, sequences_of(sample_of))
    assert whole.unique().numel() > 1
    torch.testing.assert_close(on_two_ranks(inputs, sample_of, compute), whole.double())


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("masks", [False, True])
def test_a_sequence_is_weighed_by_the_product_or_the_mean_of_its_tokens(mean: bool, masks: bool) -> None:
    inputs, sample_of = pack(engine=0.3)
    assert inputs.old_log_probs is not None
    assert inputs.rollout_log_probs is not None
    ratio = engine_log_ratio(inputs, sequences_of(sample_of), mean=mean)
    bounds = (0.9, 1.1) if mean else (0.7, 1.4)
    config = PolicyLossConfig(use_tis=True, tis_masks=masks, tis_clip_low=bounds[0], tis_clip=bounds[1])
    found = policy_loss(replace(inputs, engine_log_ratio=ratio), config)
    weights = torch.zeros(len(sample_of), dtype=torch.float64)
    for number, count in enumerate(COUNTS):
        own = (sample_of == number) & (inputs.weights > 0)
        if count:
            product = math.prod((inputs.old_log_probs - inputs.rollout_log_probs)[own].exp().tolist())
            weight = product ** (1 / count) if mean else product
            inside = min(max(weight, bounds[0]), bounds[1])
            weights[own] = (weight if inside == weight else 0.0) if masks else inside
    plain = gradient_of(policy_loss(inputs, PolicyLossConfig()).loss, inputs)
    torch.testing.assert_close(gradient_of(found.loss, inputs), plain * weights)
    share = found.metrics.values()["tis_clip_share"]
    assert 0 < share < 1, "some sequences are beyond the bounds, and others not"
    assert found.metrics.values()["tis_weight"] == pytest.approx((weights * inputs.weights).sum().item())


def test_sequences_that_went_off_policy_the_wrong_way_are_left_out() -> None:
    """DeepSeek-V3.2's M: 0 for a negative advantage and mean(log(engine / policy)) > delta."""
    inputs, sample_of = pack(engine=0.3)
    assert inputs.rollout_log_probs is not None
    inputs = replace(inputs, advantages=torch.tensor([-1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[sample_of])
    drift = [
        (inputs.rollout_log_probs - inputs.log_probs)[(sample_of == n) & (inputs.weights > 0)].mean().item()
        for n in (0, 1, 2, 4)
    ]
    for delta in (min(drift) - 0.1, 0.0, max(drift) + 0.1):
        kept = off_policy_kept(inputs, sequences_of(sample_of), delta)
        expected = [float(not (n in (0, 2) and one > delta)) for n, one in zip((0, 1, 2, 4), drift, strict=True)]
        assert [kept[sample_of == n].unique().tolist() for n in (0, 1, 2, 4)] == [[one] for one in expected]
        found = policy_loss(replace(inputs, kept=kept), PolicyLossConfig())
        plain = gradient_of(policy_loss(inputs, PolicyLossConfig()).loss, inputs)
        torch.testing.assert_close(gradient_of(found.loss, inputs), plain * kept)
        assert found.metrics.values()["opsm_share"] == pytest.approx(((1 - kept) * inputs.weights).sum().item())


def test_a_users_own_weights_are_taken_and_nonsense_is_a_sentence() -> None:
    inputs, sample_of = pack(engine=0.3)
    assert inputs.old_log_probs is not None
    assert inputs.rollout_log_probs is not None
    sequences = sequences_of(sample_of)

    def token_level(trainer: list, engine: list, trained: list) -> list:
        assert [len(one) for one in trained] == [count + 2 for count in COUNTS]
        assert [int(one.sum()) for one in trained] == list(COUNTS)
        return [(one - other).exp().clamp(0.5, 1.5) for one, other in zip(trainer, engine, strict=True)]

    own = replace(inputs, custom_weights=custom_weights(inputs, sequences, token_level))
    found = policy_loss(own, PolicyLossConfig())
    expected = policy_loss(inputs, PolicyLossConfig(use_tis=True, tis_clip=1.5, tis_clip_low=0.5))
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.metrics.values()["tis_weight"] == pytest.approx(expected.metrics.values()["tis_weight"])
    with pytest.raises(UserError, match="returns weights of shapes"):
        custom_weights(inputs, sequences, lambda trainer, engine, trained: trainer[1:])
    endless = custom_weights(inputs, sequences, lambda trainer, engine, trained: [one / 0 for one in trainer])
    measured = policy_loss(replace(inputs, custom_weights=endless), PolicyLossConfig()).metrics.values()
    with pytest.raises(UserError, match="not finite"):
        check_custom_weights(measured["tis_weight"])
    check_custom_weights(found.metrics.values()["tis_weight"])


def test_dr_grpo_weighs_a_token_the_same_in_every_batch() -> None:
    counts = [2, 0, 5]
    [weight, _, other] = sequence_weights(counts, per_token=True)
    scale = constant_length_scale(counts, 10)
    assert weight * scale == pytest.approx(1 / 20)
    assert other * scale == pytest.approx(1 / 20)
    assert constant_length_scale([0, 0], 10) == 0


def test_dr_grpo_changes_what_is_learned_and_not_what_is_measured() -> None:
    samples = [replace(one, loss_mask=np.ones_like(one.loss_mask)) for one in samples_of([1.0, -1.0], [5, 2])]
    values: dict = {
        "model": {"hf_checkpoint": "/x", "bf16": False},
        "data": {"prompt_data": "/x"},
        "rollout": {"num_rollout": 1, "rollout_batch_size": 1, "n_samples_per_prompt": 2}
        | {"rollout_max_response_len": 10},
        "optimizer": {"lr": 1e-3},
        "grpo": {"dr_grpo": True},
    }
    [batch] = optimizer_batches(samples, Config.model_validate(values))
    assert sum(one.weight * one.response_length for one in batch) == pytest.approx(1)
    for one, given in zip(batch, samples, strict=True):
        assert one.advantages is not None
        assert given.advantages is not None
        np.testing.assert_allclose(one.weight * one.advantages, given.advantages / 20, rtol=1e-5)


@pytest.mark.parametrize("of_policy", [{}, {"calculate_per_token_loss": True}, {"dr_grpo": True}])
def test_every_draft_that_the_mtp_layer_learns_weighs_the_same(of_policy: dict) -> None:
    """In each optimizer step of a rollout, of long and short responses alike, whatever the policy's tokens weigh. The
    second token of each response is not trained; it and the one after it are not learned."""
    lengths = [5, 2, 7, 1, 0, 4, 2, 2]
    values: dict = {
        "model": {"hf_checkpoint": "/x", "bf16": False},
        "data": {"prompt_data": "/x"},
        "rollout": {"num_rollout": 1, "rollout_batch_size": 4, "n_samples_per_prompt": 2, "global_batch_size": 4}
        | {"rollout_max_response_len": 10},
        "optimizer": {"lr": 1e-3},
        "grpo": of_policy,
    }
    first, second = optimizer_batches(samples_of([0.0] * 8, lengths), Config.model_validate(values))
    learned = [[one.mtp_mask.nonzero()[0].tolist() for one in batch] for batch in (first, second)]
    assert learned == [[[3, 4], [], [3, 4, 5, 6], []], [[], [3], [], []]]
    assert [one.mtp_weight for one in (*first, *second)] == pytest.approx([1 / 6] * 4 + [1.0] * 4)


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
        penalise_kl(
            s.advantages,
            np.where(s.loss_mask, old[s.index], reference[s.index]),
            reference[s.index],
            0.3,
            to_go=estimator == "reinforce_plus_plus",
        )
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
