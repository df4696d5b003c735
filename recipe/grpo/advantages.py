"""What a response is worth beside others: the advantages of `--advantage-estimator`.

R: tokens of a response.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recipe.config.groups_training import Estimator
from recipe.messages import FloatArray
from recipe.system.errors import UserError

STD_EPSILON = 1e-6


def response_advantages(
    rewards: Sequence[float | None], estimator: Estimator, *, std_normalization: bool
) -> list[float]:
    """The advantage of each response to one prompt, before any normalisation over the batch. A reward that is None
    counts nowhere, and has the advantage 0, as has one that is left alone by others. Raises UserError for a group that
    is too small for the estimator."""
    counted = [reward for reward in rewards if reward is not None]
    if len(counted) == len(rewards):
        return _advantages(counted, estimator, std_normalization)
    compares = estimator != "reinforce_plus_plus"
    known = [0.0] if compares and len(counted) < 2 else _advantages(counted, estimator, std_normalization)
    found = iter(known)
    return [0.0 if reward is None else next(found) for reward in rewards]


def _advantages(rewards: Sequence[float], estimator: Estimator, std_normalization: bool) -> list[float]:
    match estimator:
        case "rloo":
            return leave_one_out_advantages(rewards)
        case "reinforce_plus_plus":
            return list(rewards)
        case "reinforce_plus_plus_baseline":
            return group_advantages(rewards, std_normalization=False)
        case _:
            return group_advantages(rewards, std_normalization=std_normalization)


def normalises_over_batch(estimator: Estimator) -> bool:
    """Whether advantages are made comparable over all responses of a rollout, as REINFORCE++ has it."""
    return estimator in ("reinforce_plus_plus", "reinforce_plus_plus_baseline")


def group_advantages(rewards: Sequence[float], *, std_normalization: bool = True) -> list[float]:
    """GRPO's advantage of each response to one prompt: its reward less the group's mean, over the group's sample
    standard deviation (n - 1 in the denominator, plus 1e-6; Shao et al., arXiv:2402.03300, section 4.1.2).

    Without `std_normalization` the deviation is left out, which removes the bias towards questions that are nearly
    always or nearly never answered (Dr. GRPO: Liu et al., arXiv:2503.20783). Equal rewards give exactly zero.
    Rewards must be finite. Raises UserError for a group of one, which has no baseline.
    """
    size = _size_of(rewards)
    if min(rewards) == max(rewards):
        return [0.0] * size
    mean = math.fsum(rewards) / size
    centred = [reward - mean for reward in rewards]
    if not std_normalization:
        return centred
    deviation = math.sqrt(math.fsum(value * value for value in centred) / (size - 1))
    return [value / (deviation + STD_EPSILON) for value in centred]


def leave_one_out_advantages(rewards: Sequence[float]) -> list[float]:
    """RLOO's advantage of each response to one prompt: its reward less the mean of the others' (Ahmadian et al.,
    arXiv:2402.14740). Equal rewards give exactly zero. Raises UserError for a group of one."""
    size = _size_of(rewards)
    if min(rewards) == max(rewards):
        return [0.0] * size
    mean = math.fsum(rewards) / size
    return [size / (size - 1) * (reward - mean) for reward in rewards]


def _size_of(rewards: Sequence[float]) -> int:
    """Of a group. Raises UserError if it has no baseline."""
    if (size := len(rewards)) < 2:
        raise UserError(f"a group of {size} response has no baseline: set --n-samples-per-prompt to 2 or more")
    return size


def penalise_kl(
    advantages: FloatArray, log_probs: FloatArray, ref_log_probs: FloatArray, kl_coef: float, *, to_go: bool = False
) -> FloatArray:
    """KL in the reward: the advantages [R] of a response's tokens, less `kl_coef` times each token's own
    log(policy / reference), from the log-probs [R] of the policy that sampled it and of the reference model.

    The penalty counts as every token's immediate reward and is not normalised by the group, so it depends on no other
    token or response. With `to_go` a token also answers for those after it (the return of REINFORCE++: Hu et al.,
    arXiv:2501.03262, undiscounted).
    """
    penalty = np.float32(kl_coef) * (log_probs - ref_log_probs)
    return advantages - (np.cumsum(penalty[::-1])[::-1] if to_go else penalty)


def normalised_over_batch(advantages: Sequence[FloatArray], masks: Sequence[NDArray[np.bool_]]) -> list[FloatArray]:
    """The advantages [R] of all responses, less their mean over all trained tokens (the masks [R]), over their standard
    deviation there plus 1e-6 (REINFORCE++: Hu et al., arXiv:2501.03262). Where all are equal they become 0."""
    trained = np.concatenate([one[mask] for one, mask in zip(advantages, masks, strict=True)]).astype(np.float64)
    if not trained.size or trained.min() == trained.max():
        return [np.zeros_like(one) for one in advantages]
    mean, deviation = trained.mean(), trained.std() + STD_EPSILON
    return [((one - mean) / deviation).astype(np.float32) for one in advantages]
