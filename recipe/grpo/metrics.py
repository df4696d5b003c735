"""The names and plain numbers by which a loss is reported."""

from dataclasses import dataclass
from enum import StrEnum


class Metric(StrEnum):
    """What a loss reports. All but the maximum are weighted sums, which over a whole batch are weighted means."""

    LOSS = "loss"
    POLICY_LOSS = "policy_loss"
    RATIO = "ratio"
    CLIP_FRACTION = "clip_fraction"
    """Share of tokens whose gradient the PPO clip removed."""
    DUAL_CLIP_FRACTION = "dual_clip_fraction"
    POLICY_KL = "policy_kl"
    """k1 estimate of KL(old policy || policy): how far the steps on this rollout have moved."""
    ENTROPY = "entropy"
    REFERENCE_KL = "reference_kl"
    TIS_WEIGHT = "tis_weight"
    TIS_CLIP_FRACTION = "tis_clip_fraction"
    ROLLOUT_LOG_PROB_DIFF = "rollout_log_prob_diff"
    """|trainer's log-prob - engine's log-prob| before the step: the train/rollout mismatch."""
    ROLLOUT_LOG_PROB_DIFF_MAX = "rollout_log_prob_diff_max"
    ROLLOUT_KL = "rollout_kl"
    """k3 estimate of KL(engine || trainer)."""
    ROLLOUT_BEYOND_2 = "rollout_beyond_2"
    """Share of tokens to which trainer and engine give probabilities that differ by more than a factor of 2."""
    ROLLOUT_BEYOND_10 = "rollout_beyond_10"
    """Likewise, of 10."""


@dataclass(frozen=True)
class SourceDifference:
    """|trainer's log-prob - engine's| over the trained tokens of one source."""

    total: float
    tokens: int
    beyond_10: int
    """Tokens whose two probabilities differ by more than a factor of 10."""
