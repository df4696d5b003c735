"""Sampling of one token a row, as SGLang does it: temperature, then top-k and top-p, log-probs before them.

A row's draw depends on its seed and the token's position alone, never on the rows beside it.

Letters: R rows, V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def uniforms(seeds_R: Integers, positions_R: Integers) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each pair of seed and position, by SplitMix64's finalizer (Steele et al., OOPSLA 2014)."""
    mixed = _mix(_mix(seeds_R.astype(np.uint64)) + positions_R.astype(np.uint64) * _GOLDEN)
    return (mixed >> np.uint64(32)).astype(np.float64) / 2.0**32


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))


def scaled_log_probs(logits_RV: Tensor, temperatures_R: Floats) -> Tensor:
    """[R, V]: log-probs of the temperature-scaled distribution, which SGLang reports."""
    if (temperatures_R != 1.0).any():
        logits_RV = logits_RV / torch.from_numpy(temperatures_R)[:, None]
    return torch.log_softmax(logits_RV, dim=-1)


def sample(
    log_probs_RV: Tensor,
    greedy_R: npt.NDArray[np.bool_],
    top_k_R: Integers,
    top_p_R: Floats,
    uniforms_R: npt.NDArray[np.float64],
) -> Tensor:
    """[R]: the sampled tokens; a greedy row takes its most likely one."""
    if greedy_R.all():
        return log_probs_RV.argmax(-1)
    weights_RV = log_probs_RV.double().exp_()
    if (top_k_R < log_probs_RV.shape[1]).any() or (top_p_R < 1.0).any():
        _filter(weights_RV, top_k_R, top_p_R)
    cumulated_RV = weights_RV.cumsum(-1)
    targets_R = torch.from_numpy(uniforms_R) * cumulated_RV[:, -1]
    tokens_R = (cumulated_RV <= targets_R[:, None]).sum(-1)
    if greedy_R.any():
        tokens_R = torch.where(torch.from_numpy(greedy_R), log_probs_RV.argmax(-1), tokens_R)
    return tokens_R


def _filter(weights_RV: Tensor, top_k_R: Integers, top_p_R: Floats) -> None:
    """Sets the weights of the tokens that may not be drawn to zero, in place."""
    sorted_RV, order_RV = weights_RV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(weights_RV.shape[1])
    before_RV = sorted_RV.cumsum(-1) - sorted_RV
    drop_RV = ranks_V >= torch.from_numpy(top_k_R)[:, None]
    drop_RV |= (before_RV > torch.from_numpy(top_p_R)[:, None]) & (torch.from_numpy(top_p_R) < 1.0)[:, None]
    weights_RV.masked_fill_(torch.zeros_like(drop_RV).scatter_(1, order_RV, drop_RV), 0.0)
