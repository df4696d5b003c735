import itertools
import math
from dataclasses import fields, replace

import pytest
import torch

from recipe.experience import sequence_weights
from recipe.grpo.kl import KLEstimator
from recipe.grpo.loss import LossMetrics, PolicyLossConfig, PolicyLossInputs, policy_loss, sft_loss

pytestmark = pytest.mark.smoke

EVERYTHING = PolicyLossConfig(
    eps_clip=0.2,
    eps_clip_high=0.28,
    eps_clip_c=3.0,
    entropy_coef=0.01,
    kl_loss_coef=0.1,
    kl_estimator=KLEstimator.LOW_VAR_KL,
    use_tis=True,
    tis_clip=1.5,
    tis_clip_low=0.5,
    num_sources=3,
)


def random_inputs(counts=(4, 1, 6, 0, 3), *, per_token=False, seed=0) -> PolicyLossInputs:
    """Sequences of `counts` trainable tokens, each between two that are not trained on."""
    generator = torch.Generator().manual_seed(seed)
    weights = sequence_weights(counts, per_token=per_token)
    total = sum(counts) + 2 * len(counts)

    def normal(scale=1.0):
        return scale * torch.randn(total, generator=generator, dtype=torch.float64)

    log_probs = -normal().abs() - 0.5
    return PolicyLossInputs(
        log_probs=log_probs.requires_grad_(),
        advantages=normal(),
        weights=torch.tensor([w for n, each in zip(counts, weights, strict=True) for w in [0.0, *[each] * n, 0.0]]),
        old_log_probs=log_probs.detach() + normal(0.4),
        rollout_log_probs=log_probs.detach() + normal(0.6),
        ref_log_probs=log_probs.detach() + normal(0.3),
        entropy=normal().abs(),
        sources=torch.arange(total) % 3,
        sequence_log_ratio=normal(0.3),
    )


def corrected(inputs: PolicyLossInputs) -> PolicyLossInputs:
    """With what sequences and a user's function say of the tokens."""
    draws = torch.randn(3, len(inputs.weights), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = (draws[2] > -1).double()
    return replace(inputs, engine_log_ratio=0.3 * draws[0], custom_weights=draws[1].exp(), kept=kept)


def part(inputs: PolicyLossInputs, tokens: slice) -> PolicyLossInputs:
    tensors = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return PolicyLossInputs(**{name: None if one is None else one[tokens] for name, one in tensors.items()})


def values(metrics: LossMetrics) -> dict[str, float]:
    return metrics.values()


def one_token(ratio: float, advantage: float, config: PolicyLossConfig) -> tuple[float, float]:
    """The loss of one token of the given ratio, and its gradient by the log-prob."""
    log_probs = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    loss = policy_loss(PolicyLossInputs(log_probs, advantage * one, one, old_log_probs=0 * one), config).loss
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return loss.item(), gradient.item()


@pytest.mark.parametrize("per_token", [True, False])
def test_loss_metrics_and_gradient_do_not_depend_on_the_microbatches(per_token):
    inputs = corrected(random_inputs(per_token=per_token))
    whole = policy_loss(inputs, EVERYTHING)
    (gradient,) = torch.autograd.grad(whole.loss, inputs.log_probs)
    borders = [0, 3, 4, 13, 13, len(inputs.log_probs)]
    parts = [policy_loss(part(inputs, slice(*border)), EVERYTHING) for border in itertools.pairwise(borders)]
    loss = sum(output.loss for output in parts)
    metrics = parts[0].metrics
    for output in parts[1:]:
        metrics = metrics + output.metrics
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs.log_probs)[0], gradient)
    assert values(metrics) == pytest.approx(values(whole.metrics))
    torch.testing.assert_close(metrics.by_source, whole.metrics.by_source)


def test_the_mismatch_of_a_source_is_that_of_its_trained_tokens():
    inputs = random_inputs()
    inputs = replace(inputs, rollout_log_probs=10 * inputs.rollout_log_probs)
    found = policy_loss(inputs, EVERYTHING).metrics.source_differences()
    for source, difference in enumerate(found):
        own = (inputs.sources == source) & (inputs.weights > 0)
        expected = (inputs.old_log_probs - inputs.rollout_log_probs)[own].abs().sum()
        assert difference.tokens == own.sum()
        assert difference.total == pytest.approx(expected.item())
        far = (inputs.old_log_probs - inputs.rollout_log_probs)[own].abs() > math.log(10)
        assert difference.beyond_10 == far.sum()
    assert sum(difference.beyond_10 for difference in found) > 0
    assert policy_loss(replace(inputs, sources=None), EVERYTHING).metrics.source_differences() == ()


def test_the_two_reductions_are_the_means_of_the_papers():
    log_probs = torch.tensor([-1.0, -2.0, -3.0, -6.0])
    for per_token, expected in [(True, 3.0), (False, (1 + (2 + 3 + 6) / 3) / 2)]:
        alone, other = sequence_weights([1, 3], per_token=per_token)
        assert sft_loss(log_probs, torch.tensor([alone, other, other, other])).loss.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the range: the plain surrogate
        (1.3, 2.0, -2.56, 0.0),  # good and already likelier: clipped at 1 + eps_clip_high
        (0.5, 2.0, -1.0, -1.0),  # good and less likely: never clipped
        (0.5, -2.0, 1.6, 0.0),  # bad and already less likely: clipped at 1 - eps_clip
        (1.5, -2.0, 3.0, 3.0),  # bad and likelier: not clipped
        (5.0, -2.0, 6.0, 0.0),  # bad and far likelier: dual clip at c = 3
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, gradient):
    config = PolicyLossConfig(eps_clip=0.2, eps_clip_high=0.28, eps_clip_c=3.0)
    assert one_token(ratio, advantage, config) == pytest.approx((loss, gradient), abs=1e-12)


def test_without_dual_clip_a_bad_token_pulls_with_all_its_ratio():
    assert one_token(5.0, -2.0, PolicyLossConfig()) == pytest.approx((10.0, 10.0))


def test_the_upper_clip_is_the_lower_one_if_not_given():
    assert one_token(1.3, 1.0, PolicyLossConfig(eps_clip=0.1))[0] == pytest.approx(-1.1)


def test_gradient_is_that_of_finite_differences():
    inputs = random_inputs()

    def loss(log_probs):
        return policy_loss(replace(inputs, log_probs=log_probs), EVERYTHING).loss

    assert torch.autograd.gradcheck(loss, inputs.log_probs)


def test_with_one_step_the_ratio_is_exactly_one_and_the_gradient_is_reinforce():
    inputs = replace(random_inputs(), old_log_probs=None, rollout_log_probs=None, ref_log_probs=None, entropy=None)
    output = policy_loss(inputs, PolicyLossConfig())
    (gradient,) = torch.autograd.grad(output.loss, inputs.log_probs)
    torch.testing.assert_close(gradient, -inputs.weights * inputs.advantages)
    metrics = values(output.metrics)
    assert metrics["clip_share"] == 0
    assert metrics["policy_kl"] == 0
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)


def test_tis_weighs_by_the_truncated_ratio_of_trainer_to_engine():
    weights = torch.full((3,), 1 / 3, dtype=torch.float64)
    old = torch.zeros(3, dtype=torch.float64)
    log_probs = old.clone().requires_grad_()
    rollout = -torch.tensor([1.0, 4.0, 0.1], dtype=torch.float64).log()
    inputs = PolicyLossInputs(log_probs, old + 1, weights, old_log_probs=old, rollout_log_probs=rollout)
    output = policy_loss(inputs, PolicyLossConfig(use_tis=True, tis_clip=2.0, tis_clip_low=0.5))
    (gradient,) = torch.autograd.grad(output.loss, log_probs)
    torch.testing.assert_close(gradient, -weights * torch.tensor([1.0, 2.0, 0.5]))
    metrics = values(output.metrics)
    assert metrics["tis_weight"] == pytest.approx(3.5 / 3)
    assert metrics["tis_clip_share"] == pytest.approx(2 / 3)


def test_tis_makes_the_tokens_of_older_weights_worth_what_the_current_ones_give_them():
    """A response of two versions: the expected gradient under the weights that sampled it, token by token, is that of
    sampling from the current ones."""
    generator = torch.Generator().manual_seed(3)
    older, current = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    config = PolicyLossConfig(use_tis=True, tis_clip=100.0)

    def expected_gradient(sampled_from, weighted):
        log_probs = current.clone().requires_grad_()
        inputs = PolicyLossInputs(log_probs, advantages, sampled_from.exp(), rollout_log_probs=sampled_from)
        loss = policy_loss(inputs, config if weighted else PolicyLossConfig()).loss
        return torch.autograd.grad(loss, log_probs)[0]

    on_policy = expected_gradient(current, weighted=False)
    torch.testing.assert_close(expected_gradient(older, weighted=True), on_policy)
    assert not torch.allclose(expected_gradient(older, weighted=False), on_policy)


def test_tis_changes_nothing_where_engine_and_trainer_agree():
    inputs = random_inputs()
    inputs = replace(inputs, rollout_log_probs=inputs.old_log_probs)
    with_tis = policy_loss(inputs, PolicyLossConfig(use_tis=True)).loss
    torch.testing.assert_close(with_tis, policy_loss(inputs, PolicyLossConfig()).loss)


def test_mismatch_is_measured_between_old_policy_and_engine():
    weights = torch.tensor([0.5, 0.5, 0.0])
    old, rollout = torch.tensor([[-1.0, -2.0, -9.0], [-1.5, -2.0, 0.0]])
    metrics = values(policy_loss(PolicyLossInputs(old, old, weights, None, rollout), PolicyLossConfig()).metrics)
    assert metrics["logprob_diff_mean"] == pytest.approx(0.25)
    assert metrics["logprob_diff_max"] == pytest.approx(0.5)
    assert metrics["logprob_kl"] == pytest.approx((torch.tensor(0.5).exp().item() - 1 - 0.5) / 2)


def test_tokens_on_which_trainer_and_engine_disagree_are_counted():
    old = torch.zeros(5)
    rollout = torch.tensor([0.1, -0.7, 0.68, 2.4, 50.0])
    weights = torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])
    metrics = values(policy_loss(PolicyLossInputs(old, old, weights, None, rollout), PolicyLossConfig()).metrics)
    assert metrics["logprob_beyond_2"] == pytest.approx(0.5)
    assert metrics["logprob_beyond_10"] == pytest.approx(0.25)


def test_loss_is_the_sum_of_its_terms():
    inputs = random_inputs()
    metrics = values(policy_loss(inputs, EVERYTHING).metrics)
    assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + 0.1 * metrics["kl"] - 0.01 * metrics["entropy"])


def test_terms_with_coefficient_zero_are_measured_but_carry_no_gradient():
    inputs = random_inputs()
    inputs.entropy.requires_grad_()
    output = policy_loss(inputs, PolicyLossConfig())
    torch.testing.assert_close(output.loss.detach(), output.metrics.scalars["policy_loss"])
    assert torch.autograd.grad(output.loss, inputs.entropy, allow_unused=True) == (None,)
    assert {"entropy", "kl"} <= output.metrics.scalars.keys()


def test_what_is_not_measured_is_absent():
    bare = replace(random_inputs(), old_log_probs=None, rollout_log_probs=None, ref_log_probs=None, entropy=None)
    measured = values(policy_loss(bare, PolicyLossConfig()).metrics)
    assert measured.keys() == {"loss", "policy_loss", "ratio", "clip_share", "policy_kl"}


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
def test_garbage_at_untrained_tokens_reaches_neither_loss_nor_gradient(garbage):
    inputs = corrected(random_inputs())
    clean = policy_loss(inputs, EVERYTHING)
    (clean_gradient,) = torch.autograd.grad(clean.loss, inputs.log_probs)
    dirty = PolicyLossInputs(
        **{
            field.name: torch.where(inputs.weights > 0, getattr(inputs, field.name).detach(), garbage)
            for field in fields(inputs)
            if field.name not in ("weights", "sources")
        },
        weights=inputs.weights,
        sources=inputs.sources,
    )
    dirty.log_probs.requires_grad_()
    output = policy_loss(dirty, EVERYTHING)
    (gradient,) = torch.autograd.grad(output.loss, dirty.log_probs)
    torch.testing.assert_close(output.loss, clean.loss)
    torch.testing.assert_close(gradient, clean_gradient)
    assert values(output.metrics) == pytest.approx(values(clean.metrics))
    torch.testing.assert_close(output.metrics.by_source, clean.metrics.by_source)


@pytest.mark.parametrize("name", ["log_probs", "advantages", "old_log_probs", "ref_log_probs", "entropy"])
def test_nan_at_one_trained_token_makes_the_loss_nan(name):
    inputs = random_inputs()
    value = getattr(inputs, name).detach().clone()
    value[1] = float("nan")
    assert policy_loss(replace(inputs, **{name: value}), EVERYTHING).loss.isnan()


def test_extreme_ratios_stay_finite():
    log_probs = torch.tensor([0.0, -300.0], requires_grad=True)
    half = torch.tensor([0.5, 0.5])
    inputs = PolicyLossInputs(log_probs, torch.tensor([0.0, 1.0]), half, torch.tensor([-300.0, 0.0]))
    loss = policy_loss(inputs, PolicyLossConfig()).loss
    loss.backward()
    assert loss.isfinite()
    assert log_probs.grad.isfinite().all()


def test_a_rank_that_holds_no_token_adds_nothing():
    empty = part(random_inputs(), slice(0, 0))
    output = policy_loss(empty, EVERYTHING)
    output.loss.backward()
    assert set(values(output.metrics).values()) == {0.0}


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (PolicyLossConfig(use_tis=True), "rollout_log_probs"),
        (PolicyLossConfig(kl_loss_coef=0.1), "ref_log_probs"),
        (PolicyLossConfig(entropy_coef=0.1), "entropy"),
    ],
)
def test_a_term_without_its_input_is_an_error(config, missing):
    with pytest.raises(ValueError, match=missing):
        policy_loss(replace(random_inputs(), **{missing: None}), config)


def test_metrics_are_reduced_by_one_sum_and_one_maximum_over_ranks():
    inputs = random_inputs()
    parts = (part(inputs, tokens) for tokens in (slice(0, 9), slice(9, None)))
    ranks = [replace(policy_loss(one, EVERYTHING).metrics, by_source=None) for one in parts]
    maximal = torch.stack([ranks[1].scalars["logprob_diff_max"]])
    summed = torch.stack([value for name, value in ranks[1].scalars.items() if name != "logprob_diff_max"])
    reduced = ranks[0].reduced(lambda mine: mine + summed, lambda mine: torch.maximum(mine, maximal))
    assert reduced.values() == pytest.approx(values(policy_loss(inputs, EVERYTHING).metrics))


def test_sft_loss_ignores_what_is_not_trained_on():
    log_probs = torch.tensor([-1.0, float("-inf"), -3.0], requires_grad=True)
    output = sft_loss(log_probs, torch.tensor([0.25, 0.0, 0.75]))
    output.loss.backward()
    assert values(output.metrics) == {"loss": pytest.approx(2.5)}
    torch.testing.assert_close(log_probs.grad, torch.tensor([-0.25, 0.0, -0.75]))
