"""What belongs to whole sequences, whose tokens a pack, or several context-parallel ranks, hold in parts.

Letters: T tokens of the pack on this rank, N sequences, R tokens of a response.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recipe.grpo.loss import PolicyLossInputs
from recipe.system.errors import UserError

WeightFunction = Callable[[list[Tensor], list[Tensor], list[Tensor]], Sequence[Tensor]]
"""A user's own correction: of each response of a pack the log-probs [R] of the trainer's policy before the rollout's
first step, those of the engine, and which tokens are trained [R] -> the weight of every token in the loss, [R] each."""
CUSTOM_TIS = "--custom-tis-function-path"


@dataclass(frozen=True)
class Sequences:
    """The sequences of a pack."""

    sample_of: Tensor
    """[T] which of them a token is of."""
    places: Tensor
    """[T] its place among the tokens of all responses, one after the other."""
    lengths: tuple[int, ...]
    """[N] R of each, on all ranks."""
    trained: Tensor
    """[N] trained tokens of each, on all ranks."""
    over_ranks: Callable[[Tensor], Tensor]
    """Adds a vector up over the ranks that share sequences."""

    def sums(self, each: Tensor) -> Tensor:
        """[T] -> [T]: the sum over a token's sequence."""
        return self.over_ranks(each.new_zeros(len(self.lengths)).index_add(0, self.sample_of, each))[self.sample_of]

    def means(self, each: Tensor) -> Tensor:
        """[T], 0 where a token is not trained -> [T]: the mean over the trained tokens of a token's sequence."""
        return self.sums(each) / self.trained.clamp(min=1)[self.sample_of]

    def whole(self, each: Tensor) -> list[Tensor]:
        """[T] -> [R] of each sequence."""
        flat = each.new_zeros(sum(self.lengths)).index_copy(0, self.places, each)
        return list(self.over_ranks(flat).split(self.lengths))

    def own(self, of_each: Sequence[Tensor]) -> Tensor:
        """[R] of each sequence -> [T]."""
        return torch.cat(list(of_each))[self.places]


def sequence_log_ratio(inputs: PolicyLossInputs, sequences: Sequences) -> Tensor | None:
    """[T] of each token's sequence the mean log(policy / old policy) over its trained tokens, without a gradient (GSPO:
    arXiv:2507.18071, section 4, the logarithm of its ratio). None without old log-probs."""
    if inputs.old_log_probs is None:
        return None
    return sequences.means(_at_trained(inputs, inputs.log_probs.detach() - inputs.old_log_probs))


def engine_log_ratio(inputs: PolicyLossInputs, sequences: Sequences, *, mean: bool) -> Tensor:
    """[T] of each token's sequence log(policy before the first step / engine): their sum over its trained tokens, the
    importance weight of the whole sequence, or their mean, whose exponential is the geometric mean of the tokens'
    weights."""
    each = _at_trained(inputs, _before_first_step(inputs) - _of_engine(inputs))
    return sequences.means(each) if mean else sequences.sums(each)


def off_policy_kept(inputs: PolicyLossInputs, sequences: Sequences, delta: float) -> Tensor:
    """[T] 0 where off-policy sequence masking leaves a token out, else 1 (DeepSeek-V3.2, arXiv:2512.02556, section
    3.1): sequences of negative advantage that the policy now gives less than the engine did, by more than `delta` nats
    a token, mean(log(engine / policy)) > delta."""
    drift = sequences.means(_at_trained(inputs, _of_engine(inputs) - inputs.log_probs.detach()))
    return 1.0 - ((inputs.advantages < 0) & (drift > delta)).to(drift.dtype)


def custom_weights(inputs: PolicyLossInputs, sequences: Sequences, function: WeightFunction) -> Tensor:
    """[T] what a user's function says. Raises UserError if it is not a weight for every token; whether all are finite
    the GPU tells later, see `check_custom_weights`."""
    trained = [one > 0 for one in sequences.whole((inputs.weights > 0).float())]
    trainer = sequences.whole(_at_trained(inputs, _before_first_step(inputs)))
    engine = sequences.whole(_at_trained(inputs, _of_engine(inputs)))
    weights = list(function(trainer, engine, trained))
    found, wanted = [tuple(one.shape) for one in weights], [(length,) for length in sequences.lengths]
    if found != wanted:
        raise UserError(f"{CUSTOM_TIS}: it returns weights of shapes {found[:4]} for responses of {wanted[:4]}")
    return sequences.own([one.detach().to(inputs.weights) for one in weights])


def check_custom_weights(mean: float) -> None:
    """Raises UserError if the mean weight of a step's tokens, its metric `tis_weight`, is not finite."""
    if not math.isfinite(mean):
        raise UserError(f"{CUSTOM_TIS}: it returns weights that are not finite")


def _before_first_step(inputs: PolicyLossInputs) -> Tensor:
    return inputs.log_probs.detach() if inputs.old_log_probs is None else inputs.old_log_probs


def _of_engine(inputs: PolicyLossInputs) -> Tensor:
    if inputs.rollout_log_probs is None:
        raise ValueError("a correction needs rollout_log_probs")
    return inputs.rollout_log_probs


def _at_trained(inputs: PolicyLossInputs, each: Tensor) -> Tensor:
    return torch.where(inputs.weights > 0, each, 0.0)
