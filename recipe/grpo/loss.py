"""The losses of a pack, as sums of weighted tokens. T is the number of tokens.

Every weight comes from `recipe.experience.sequence_weights` and holds the denominators of the whole batch, so losses
and metrics of microbatches and ranks are simply added. A token of weight 0 takes no part, and its inputs may be
anything, NaN and infinity included. At tokens of weight above 0 every input must be finite: NaN there makes the loss
NaN, which the trainer answers by skipping the step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from recipe.grpo.kl import KLEstimator, approximate_kl, bounded_exp
from recipe.messages import SourceDifference
from recipe.run.metrics import MAXIMUM, MEAN, SUM, Reduction, reduction_of


@dataclass(frozen=True)
class LossMetrics:
    """Detached scalars that combine over microbatches and ranks as METRICS says. What was not measured is absent."""

    scalars: Mapping[str, Tensor]
    by_source: Tensor | None = None
    """[3, S] |trainer's log-prob - engine's| summed over the trained tokens of each source, the number of these tokens,
    and of those where it is more than log 10."""

    def __add__(self, other: "LossMetrics") -> "LossMetrics":
        """The metrics of two parts of a batch together. Both must have measured the same."""
        pairs = {name: (value, other.scalars[name]) for name, value in self.scalars.items()}
        return LossMetrics(
            {
                name: torch.maximum(*pair) if _reduction(name) is MAXIMUM else torch.add(*pair)
                for name, pair in pairs.items()
            },
            None if self.by_source is None or other.by_source is None else self.by_source + other.by_source,
        )

    def reduced(self, reduce_sum: Callable[[Tensor], Tensor], reduce_max: Callable[[Tensor], Tensor]) -> "LossMetrics":
        """After one reduction of all sums and one of all maxima, each a vector, over the ranks."""
        scalars: dict[str, Tensor] = {}
        for reduce, reductions in ((reduce_sum, (MEAN, SUM)), (reduce_max, (MAXIMUM,))):
            if names := [name for name in self.scalars if _reduction(name) in reductions]:
                scalars |= zip(names, reduce(torch.stack([self.scalars[name] for name in names])), strict=True)
        return LossMetrics(scalars, None if self.by_source is None else reduce_sum(self.by_source.clone()))

    def values(self) -> dict[str, float]:
        """As numbers: waits for the GPU."""
        return dict(zip(self.scalars, torch.stack(list(self.scalars.values())).tolist(), strict=True))

    def source_differences(self) -> tuple[SourceDifference, ...]:
        """`by_source` as numbers; empty if it was not measured. Waits for the GPU."""
        if self.by_source is None:
            return ()
        columns = self.by_source.T.tolist()
        return tuple(SourceDifference(total, int(count), int(beyond)) for total, count, beyond in columns)


@dataclass(frozen=True)
class LossOutput:
    loss: Tensor
    """Scalar with a gradient; to be added over microbatches and ranks."""
    metrics: LossMetrics


class Surrogate(StrEnum):
    """What becomes of the ratio of the policy to the old one."""

    PPO = "ppo"
    """The clipped surrogate, token by token."""
    GSPO = "gspo"
    """The same with the ratio of whole sequences."""
    CISPO = "cispo"
    """The clipped ratio as a constant weight of the log-probability."""


@dataclass(frozen=True)
class PolicyLossConfig:
    surrogate: Surrogate = Surrogate.PPO
    eps_clip: float = 0.2
    eps_clip_high: float | None = None
    """Upper clip range, eps_clip if None ("clip-higher", DAPO: arXiv:2503.14476, section 3.1)."""
    eps_clip_c: float | None = None
    """Bound c > 1 of the ratio where the advantage is negative (dual clip: Ye et al., arXiv:1912.09729, eq. 5)."""
    entropy_coef: float = 0.0
    kl_loss_coef: float = 0.0
    kl_estimator: KLEstimator = KLEstimator.LOW_VAR_KL
    use_tis: bool = False
    tis_masks: bool = False
    """Weights beyond their bounds become 0, not the bound."""
    tis_clip: float = 2.0
    tis_clip_low: float = 0.0
    num_sources: int = 0
    """Number of the tokens' sources, which `PolicyLossInputs.sources` tells apart; 0: nobody wants to know."""


@dataclass(frozen=True)
class PolicyLossInputs:
    """Tensors of one pack, all [T] and fp32: entry t is about token t, whichever position predicts it."""

    log_probs: Tensor
    """Log-probabilities by the policy being trained; the gradient flows through them."""
    advantages: Tensor
    weights: Tensor
    """From `sequence_weights`, 0 on tokens that are not trained on."""
    old_log_probs: Tensor | None = None
    """Log-probabilities by the policy before the rollout's first step. None if there is only one step: the ratio is
    then exactly 1."""
    rollout_log_probs: Tensor | None = None
    """As the engine reported them when it sampled."""
    ref_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    """Entropy of the policy being trained, in nats."""
    sources: Tensor | None = None
    """Integers below `num_sources`: where a token is from. Only measured."""
    sequence_log_ratio: Tensor | None = None
    """For GSPO, from `recipe.grpo.sequences`; None where the ratio is exactly 1."""
    engine_log_ratio: Tensor | None = None
    """For TIS of sequences, from `recipe.grpo.sequences`; None: each token has its own."""
    custom_weights: Tensor | None = None
    """In the place of TIS: a user's own."""
    kept: Tensor | None = None
    """0 at tokens that off-policy sequence masking leaves out, else 1; None: all are kept."""


def policy_loss(inputs: PolicyLossInputs, config: PolicyLossConfig) -> LossOutput:
    """The clipped surrogate loss of PPO (Schulman et al., arXiv:1707.06347, eq. 7) on GRPO's advantages.

    Per token, with ratio r = policy / old policy and advantage A: max(-A r, -A clamp(r, 1 - eps_clip,
    1 + eps_clip_high)), and where A < 0 at most -A eps_clip_c. GSPO takes for r the ratio of the token's whole sequence
    (Zheng et al., arXiv:2507.18071, section 4), of whose gradient each token has its part. CISPO takes
    -clamp(r, 1 - eps_clip, 1 + eps_clip_high) A log policy, the clamped ratio a constant (MiniMax,
    arXiv:2506.13585, section 3).

    With TIS, times the constant w = clamp(old policy / engine, tis_clip_low, tis_clip), of the token or of its
    sequence, which corrects for an engine that does not sample from exactly the trainer's policy (truncated importance
    sampling: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025; Ionides,
    2008); with `tis_masks`, times the ratio where it is within these bounds and 0 where it is not. Times 0 where
    off-policy sequence masking leaves a token out. Then plus kl_loss_coef times the KL to the reference
    (arXiv:2402.03300, eq. 3) and minus entropy_coef times the entropy.

    The KL term and its metric are there if `ref_log_probs` are given, those of entropy, TIS and mismatch likewise;
    a coefficient other than zero, or use_tis, without its input raises ValueError.
    """
    _require_inputs(inputs, config)
    trained = inputs.weights > 0

    def at_trained(value: Tensor) -> Tensor:
        return torch.where(trained, value, 0.0)

    log_probs = at_trained(inputs.log_probs)
    old = log_probs.detach() if inputs.old_log_probs is None else at_trained(inputs.old_log_probs)
    sequence = inputs.sequence_log_ratio
    token_loss, measured = _surrogate(log_probs, old, at_trained(inputs.advantages), sequence, config)
    by_source = None
    if inputs.rollout_log_probs is not None:
        rollout = at_trained(inputs.rollout_log_probs)
        difference = (old - rollout).abs()
        measured["logprob_diff_mean"] = measured["logprob_diff_max"] = difference
        measured["logprob_kl"] = approximate_kl(rollout, old, KLEstimator.K3)
        measured["logprob_beyond_2"] = (difference > math.log(2)).float()
        measured["logprob_beyond_10"] = (difference > math.log(10)).float()
        if inputs.sources is not None and config.num_sources:
            by_source = _by_source(difference.detach(), trained, inputs.sources, config.num_sources)
        if config.use_tis:
            of_sequence = inputs.engine_log_ratio
            importance = bounded_exp(old - rollout if of_sequence is None else at_trained(of_sequence))
            weight = importance.clamp(config.tis_clip_low, config.tis_clip)
            measured["tis_clip_share"] = (weight != importance).float()
            if config.tis_masks:
                weight = torch.where(weight == importance, weight, 0.0)
            measured["tis_weight"] = weight
            token_loss = token_loss * weight
    if inputs.custom_weights is not None:
        measured["tis_weight"] = at_trained(inputs.custom_weights)
        token_loss = token_loss * measured["tis_weight"]
    if inputs.kept is not None:
        kept = at_trained(inputs.kept)
        measured["opsm_share"] = 1 - kept
        token_loss = token_loss * kept
    measured["policy_loss"] = token_loss
    if inputs.ref_log_probs is not None:
        kl = approximate_kl(log_probs, at_trained(inputs.ref_log_probs), config.kl_estimator)
        measured["kl"] = kl
        if config.kl_loss_coef != 0:
            token_loss = token_loss + config.kl_loss_coef * kl
    if inputs.entropy is not None:
        entropy = at_trained(inputs.entropy)
        measured["entropy"] = entropy
        if config.entropy_coef != 0:
            token_loss = token_loss - config.entropy_coef * entropy
    measured["loss"] = token_loss
    scalars = {name: _over_tokens(name, value.detach(), inputs.weights) for name, value in measured.items()}
    return LossOutput((inputs.weights * token_loss).sum(), LossMetrics(scalars, by_source))


def sft_loss(log_probs: Tensor, weights: Tensor) -> LossOutput:
    """Supervised loss: minus the weighted sum of the log-probs [T] of the given tokens."""
    loss = -(weights * torch.where(weights > 0, log_probs, 0.0)).sum()
    return LossOutput(loss, LossMetrics({"loss": loss.detach()}))


def _reduction(name: str) -> Reduction:
    return reduction_of(name, MEAN, MAXIMUM, SUM)


def _over_tokens(name: str, value: Tensor, weights: Tensor) -> Tensor:
    """A metric of tokens [T], finite at those that are not trained on, as a scalar; a maximum is over those too."""
    match _reduction(name):
        case Reduction.MEAN:
            return (weights * value).sum()
        case Reduction.SUM:
            return torch.where(weights > 0, value, 0.0).sum()
        case _:
            return value.max() if len(value) else value.new_zeros(())


def _by_source(difference: Tensor, trained: Tensor, sources: Tensor, count: int) -> Tensor:
    """[3, S]: see `LossMetrics.by_source`."""
    values = torch.stack([difference, torch.ones_like(difference), (difference > math.log(10)).float()]) * trained
    return values @ F.one_hot(sources, count).to(values.dtype)


def _surrogate(
    log_probs: Tensor, old: Tensor, advantages: Tensor, sequence: Tensor | None, config: PolicyLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The per-token surrogate loss [T] and its per-token metrics [T]."""
    log_ratio = log_probs - old
    if config.surrogate is Surrogate.GSPO and sequence is not None:
        ratio = bounded_exp(sequence + (log_probs - log_probs.detach()))
    else:
        ratio = bounded_exp(log_ratio)
    high = config.eps_clip if config.eps_clip_high is None else config.eps_clip_high
    inside = ratio.clamp(1 - config.eps_clip, 1 + high)
    if config.surrogate is Surrogate.CISPO:
        clip_share = (inside != ratio).float()
        token_loss = -advantages * inside.detach() * log_probs
        return token_loss, {"ratio": ratio, "clip_share": clip_share, "policy_kl": -log_ratio}
    unclipped, clipped = -advantages * ratio, -advantages * inside
    token_loss = torch.maximum(unclipped, clipped)
    metrics = {"ratio": ratio, "clip_share": (clipped > unclipped).float(), "policy_kl": -log_ratio}
    if config.eps_clip_c is not None:
        bound = -advantages * config.eps_clip_c
        bounded = (advantages < 0) & (token_loss > bound)
        token_loss = torch.where(bounded, bound, token_loss)
        metrics["dual_clip_share"] = bounded.float()
    return token_loss, metrics


def _require_inputs(inputs: PolicyLossInputs, config: PolicyLossConfig) -> None:
    if config.use_tis and inputs.rollout_log_probs is None:
        raise ValueError("use_tis needs rollout_log_probs")
    if config.kl_loss_coef != 0 and inputs.ref_log_probs is None:
        raise ValueError("kl_loss_coef needs ref_log_probs")
    if config.entropy_coef != 0 and inputs.entropy is None:
        raise ValueError("entropy_coef needs entropy")
