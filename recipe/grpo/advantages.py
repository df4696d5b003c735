"""Group-relative advantages (GRPO: Shao et al., arXiv:2402.03300, section 4.1.2)."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recipe.system.errors import UserError

STD_EPSILON = 1e-6


def group_advantages(rewards: Sequence[float], *, std_normalization: bool = True) -> list[float]:
    """The advantage of each response to one prompt: its reward less the group's mean, over the group's sample
    standard deviation (n - 1 in the denominator, plus 1e-6).

    Without `std_normalization` the deviation is left out, which removes the bias towards questions that are nearly
    always or nearly never answered (Dr. GRPO: Liu et al., arXiv:2503.20783). Equal rewards give exactly zero.
    Rewards must be finite. Raises UserError for a group of one, which has no baseline.
    """
    size = len(rewards)
    if size < 2:
        raise UserError(f"a group of {size} response has no baseline for GRPO: set --n-samples-per-prompt to 2 or more")
    if min(rewards) == max(rewards):
        return [0.0] * size
    mean = math.fsum(rewards) / size
    centred = [reward - mean for reward in rewards]
    if not std_normalization:
        return centred
    deviation = math.sqrt(math.fsum(value * value for value in centred) / (size - 1))
    return [value / (deviation + STD_EPSILON) for value in centred]


def penalise_kl(
    advantages: NDArray[np.float32], log_probs: NDArray[np.float32], ref_log_probs: NDArray[np.float32], kl_coef: float
) -> NDArray[np.float32]:
    """KL in the reward: the advantages [R] of a response's tokens, less `kl_coef` times each token's own
    log(policy / reference), from the log-probs [R] of the policy that sampled it and of the reference model.

    The penalty counts as every token's immediate reward and is not normalised by the group, so it depends on no other
    token or response.
    """
    return advantages - np.float32(kl_coef) * (log_probs - ref_log_probs)
