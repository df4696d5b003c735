"""What the loop and the trainer tell each other: plain data, cheap to send."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

RoutedExperts = NDArray[np.uint8]
"""[rows, M, K] the K experts that each of the M layers with experts took a token to, or NOT_ROUTED."""
NOT_ROUTED = 255
"""In place of an expert: it is not known which; the router chooses by itself."""


@dataclass(frozen=True)
class SourceDifference:
    """|trainer's log-prob - engine's| over the trained tokens of one source."""

    total: float
    tokens: int
    beyond_10: int
    """Tokens whose two probabilities differ by more than a factor of 10."""


OLDER_TOKENS = 0
"""The source of tokens that were made before the rollout that they are learned with, under older weights."""


@dataclass(frozen=True)
class TrainSample:
    """One sequence to train on. L is its length in tokens, R that of its response, which ends it."""

    index: int
    """Its number in the run."""
    tokens: NDArray[np.int64]
    """[L] prompt and response."""
    loss_mask: NDArray[np.bool_]
    """[R] which response tokens are trained on."""
    weight: float = 0.0
    """Weight in the loss of each trained token, known once the batch is; see `recipe.experience.sequence_weights`."""
    mtp_weight: float = 0.0
    """Weight in the MTP layer's loss of each of `mtp_mask`, the same for all samples of the batch."""
    advantages: FloatArray | None = None
    """[R]; None for supervised training."""
    rollout_log_probs: FloatArray | None = None
    """[R] as the engine reported them."""
    sources: NDArray[np.int64] | None = None
    """[R] where each token is from: OLDER_TOKENS, or 1 + the number of the engine that made it."""
    old_log_probs: FloatArray | None = None
    """[R] of the policy that the rollout was made with; None where a rollout has one step."""
    ref_log_probs: FloatArray | None = None
    """[R] of the reference model; None where no KL term needs it."""
    is_shown: bool = False
    """Whether the report of its optimizer step tells its log-probs."""
    routed_experts: RoutedExperts | None = None
    """[at most L - 1, M, K] what the trainer's routers are told to take, of the first tokens on; None: nothing."""

    @property
    def length(self) -> int:
        """L."""
        return len(self.tokens)

    @property
    def prompt(self) -> NDArray[np.int64]:
        """[L - R]"""
        return self.tokens[: self.length - self.response_length]

    @property
    def response(self) -> NDArray[np.int64]:
        """[R]"""
        return self.tokens[self.length - self.response_length :]

    @property
    def response_length(self) -> int:
        """R."""
        return len(self.loss_mask)

    @property
    def mtp_mask(self) -> NDArray[np.bool_]:
        """[R] which response tokens the MTP layer learns to predict: the trained ones that follow a trained one."""
        follows = np.concatenate([[False], self.loss_mask])[:-1]
        return self.loss_mask & follows


@dataclass(frozen=True)
class Scores:
    """What a pass without gradients tells of samples, by their index."""

    log_probs: dict[int, FloatArray]
    """[R] of each response."""
    routed_experts: dict[int, RoutedExperts] = field(default_factory=dict)
    """[L - 1, M, K] where the pass took each token, if that was asked for; NOT_ROUTED in layers of other ranks."""

    def __add__(self, other: "Scores") -> "Scores":
        """With those of another rank, which may have other layers of the same samples."""
        routed = {**self.routed_experts}
        for index, experts in other.routed_experts.items():
            routed[index] = np.minimum(routed[index], experts) if index in routed else experts
        return Scores({**self.log_probs, **other.log_probs}, routed)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, the same on every rank."""

    metrics: Mapping[str, float]
    """By the names of `recipe.run.metrics`."""
    skipped: bool
    """The gradients were not finite, and nothing was changed."""
    by_source: tuple[SourceDifference, ...] = ()
    """How far trainer and engines disagree, by the source of the tokens (see `TrainSample.sources`)."""
    of_rank: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Seconds and memory that the step took on this rank, by the names of `recipe.run.metrics`."""
    shown_log_probs: Mapping[int, FloatArray] = field(default_factory=dict, compare=False)
    """[R] log-probs under the weights before the step, of the samples that are shown, by their index."""


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found of one set."""

    values: Mapping[str, float | None]
    """At least `reward`, `ci95_low` and `ci95_high`."""
    scores: tuple[float, ...]
    """Of each of the set's problems, in their order: the share of right answers, or the mean reward."""
    samples_per_problem: int


@dataclass(frozen=True)
class Progress:
    """How far a run has come: what a resumed run needs besides weights and optimizer. Random streams have no state of
    their own (`recipe.system.seeds`): these numbers name them."""

    rollouts: int = 0
    """Finished rollouts: the number of the next one."""
    optimizer_steps: int = 0
    """Taken; skipped ones do not count."""
    skipped_steps: int = 0
    consecutive_skips: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    """State of the prompt source."""
    waiting: list[dict[str, Any]] = field(default_factory=list)
    """Groups of samples that the next rollout continues."""
    ahead: list[dict[str, Any]] = field(default_factory=list)
    """What was made for rollouts to come while the trainer worked; see `recipe.rollout.ahead`."""

    @property
    def counts(self) -> "Progress":
        """The numbers alone, which is all that most ranks need: the rest may hold whole rollouts."""
        return replace(self, data={}, waiting=[], ahead=[])


class RankPart(StrEnum):
    """What a training rank does one after the other when it starts."""

    IMPORTS = "imports"
    GROUPS = "groups"
    """The ranks meet, and build their process groups."""
    MODEL = "model"
    """Parameters and gradient buffers are allocated."""
    WEIGHTS = "weights"
    """Weights, and the optimizer's state of a checkpoint, are read."""
    OPTIMIZER = "optimizer"
    """The optimizer's state is allocated and, without a checkpoint of it, filled."""


@dataclass(frozen=True)
class Started:
    """The trainer, ready for its first step."""

    progress: Progress
    seconds: Mapping[RankPart, float]
    """Seconds that each part of the start took."""
