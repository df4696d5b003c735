import pytest
import torch

from recipe.grpo.kl import KLEstimator, approximate_kl


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(0)
    policy, base = torch.randn(2, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    return policy, base


def expectation(estimator, policy, base):
    """Over all tokens that the policy may sample."""
    return (policy.exp() * approximate_kl(policy, base, estimator)).sum()


@pytest.mark.parametrize("estimator", [KLEstimator.K1, KLEstimator.K3, KLEstimator.LOW_VAR_KL])
def test_is_unbiased(models, estimator):
    policy, base = models
    exact = torch.nn.functional.kl_div(base, policy, log_target=True, reduction="sum")
    torch.testing.assert_close(expectation(estimator, policy, base), exact)


def test_k3_is_never_negative_and_varies_less_than_k1(models):
    policy, base = models
    k1, k3 = (approximate_kl(policy, base, kind) for kind in (KLEstimator.K1, KLEstimator.K3))
    assert (k3 >= 0).all()
    variance = [(policy.exp() * (k - (policy.exp() * k).sum()) ** 2).sum() for k in (k1, k3)]
    assert variance[1] < variance[0]


def test_the_gradient_of_k2_is_the_gradient_of_the_kl(models):
    """In expectation over the policy's tokens, which is what autograd of a sampled k2 gives."""
    policy, base = models
    logits = policy.clone().requires_grad_()
    log_probs = logits.log_softmax(-1)
    (log_probs.exp().detach() * approximate_kl(log_probs, base, KLEstimator.K2)).sum().backward()
    sampled, logits.grad = logits.grad, None
    log_probs = logits.log_softmax(-1)
    (log_probs.exp() * (log_probs - base)).sum().backward()
    torch.testing.assert_close(sampled, logits.grad)


@pytest.mark.parametrize("estimator", list(KLEstimator))
def test_is_zero_with_zero_gradient_or_k1_between_equal_models(estimator):
    log_probs = torch.tensor([-0.1, -3.0], requires_grad=True)
    kl = approximate_kl(log_probs, log_probs.detach(), estimator)
    assert (kl == 0).all()
    kl.sum().backward()
    assert (log_probs.grad == (1.0 if estimator is KLEstimator.K1 else 0.0)).all()


@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_low_var_kl_stays_finite_and_bounded_with_its_gradient(gap):
    log_probs = torch.tensor([-gap], requires_grad=True)
    kl = approximate_kl(log_probs, torch.zeros(1), KLEstimator.LOW_VAR_KL)
    kl.sum().backward()
    assert 0 <= kl.item() <= 10
    assert log_probs.grad.isfinite().all()
