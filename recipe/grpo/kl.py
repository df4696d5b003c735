"""Estimators of KL(policy || base) from the log-probs of the sampled tokens alone (Schulman, "Approximating KL
Divergence", http://joschu.net/blog/kl-approx.html). T is the number of tokens."""

from enum import StrEnum

import torch
from torch import Tensor

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 before exp, so that neither a value nor a gradient overflows in fp32."""

LOW_VARIANCE_BOUND = 10.0


class KLEstimator(StrEnum):
    K1 = "k1"
    """log(policy / base): unbiased, of high variance, and negative for single tokens."""
    K2 = "k2"
    """Half the squared log-ratio: biased, of low variance; its gradient is the KL's."""
    K3 = "k3"
    """base / policy - 1 - log(base / policy): unbiased, never negative, of low variance."""
    LOW_VAR_KL = "low_var_kl"
    """k3 clamped to [-10, 10], so that one token cannot dominate a batch."""


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio clamped to +-LOG_RATIO_BOUND, elementwise; the gradient is zero outside of the bound."""
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()


def approximate_kl(log_probs: Tensor, base_log_probs: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(policy || base) of each token, [T], given both models' log-probs [T] of tokens sampled from the policy."""
    log_ratio = log_probs - base_log_probs
    match estimator:
        case KLEstimator.K1:
            return log_ratio
        case KLEstimator.K2:
            return log_ratio.square() / 2
        case KLEstimator.K3:
            return bounded_exp(-log_ratio) - 1 + log_ratio
        case KLEstimator.LOW_VAR_KL:
            return torch.clamp(bounded_exp(-log_ratio) - 1 + log_ratio, -LOW_VARIANCE_BOUND, LOW_VARIANCE_BOUND)
