"""What is measured in a step, and how it is written as one flat JSON line.

Every field that holds a time or a rate starts with `seconds_` or ends in `_per_second`, and no other field does: two
runs of the same seed give the same lines but for those.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum

Scalar = int | float | None
"""A value of a metrics line; None where it is not finite."""


class Phase(StrEnum):
    """What the loop is doing."""

    ROLLOUT = "rollout"
    """Engines generate."""
    REWARD = "reward"
    """Responses are graded."""
    LOG_PROBS = "log_probs"
    """Passes without gradients: old and reference log-probs."""
    TRAIN = "train"
    """Forward, backward and optimizer."""
    UPDATE_WEIGHTS = "update_weights"
    """New weights go to the engines."""
    EVAL = "eval"
    """Held-out prompts."""
    SAVE = "save"
    """A checkpoint is written."""


@dataclass(frozen=True)
class StepSeconds:
    """Wall time of a step in seconds: the whole, and what its phases took of it."""

    step: float
    phases: Mapping[Phase, float]

    @property
    def training(self) -> float:
        """The step without evaluating and saving: what rates are given over."""
        return self.step - self.phases.get(Phase.EVAL, 0.0) - self.phases.get(Phase.SAVE, 0.0)


class PhaseClock:
    """Measures a step's phases. `on_enter` is told each phase as it begins (for the progress display)."""

    def __init__(self, on_enter: Callable[[Phase], None]) -> None:
        self._on_enter = on_enter
        self._phases: dict[Phase, float] = {}
        self._step_began = time.perf_counter()

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Adds the time of the block to `phase`."""
        self._on_enter(phase)
        began = time.perf_counter()
        try:
            yield
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - began

    def lap(self) -> StepSeconds:
        """The times since the last lap; begins the next one.

        A step's line is written before its checkpoint is saved, so a save counts in the lap of the step after it.
        """
        now = time.perf_counter()
        seconds = StepSeconds(now - self._step_began, self._phases)
        self._step_began, self._phases = now, {}
        return seconds


@dataclass(frozen=True, kw_only=True)
class RolloutMetrics:
    """Means over the samples of one rollout. Shares are between 0 and 1, lengths in tokens."""

    rollout_id: int
    samples: int
    weight_version: int
    """The version of the weights that generated them."""
    reward: float
    reward_std: float
    """Standard deviation of the reward over all samples."""
    response_length: float
    truncated_share: float
    grader_failed: int
    """Samples whose grader failed: neither right nor wrong."""
    dropped_groups: int
    """Groups that the dynamic sampling filter dropped."""
    unused_groups: int
    """Groups that were not needed: aborted, or finished too late."""
    refills: int
    """Times that prompts had to be drawn again."""
    rollout_tokens_per_second: float
    """Tokens of these samples that the current weights made, a second of the rollout, grading included."""
    stale_token_share: float
    """Share of the response tokens that older weights made (`--partial-rollout`)."""
    draft_accept_length: float | None = None
    """Tokens an engine's step brings a sequence, with speculation."""
    draft_accept_rates: tuple[float, ...] = ()
    """Share of the steps in which the draft token of each depth was accepted: `draft_accept_rate_1` and on."""
    engine_restarts: int
    """Engines that had to be started again since the last rollout, up to the end of this one."""
    request_retries: int
    """Requests that had to be sent again, likewise."""
    retried_tokens: int
    """Tokens of the answers to those: at most so many were lost, and made twice."""


@dataclass(frozen=True, kw_only=True)
class TrainMetrics:
    """Means over the tokens that one rollout's optimizer steps learned from; None: not computed."""

    tokens: int
    """Prompt and response tokens trained on."""
    loss: float
    grad_norm: float
    """Of the policy, before clipping; of the last optimizer step."""
    lr: float
    skipped_steps: int
    """Optimizer steps left out for a gradient that was not finite, since the run began."""
    entropy: float | None = None
    """Of the policy, in nats a token."""
    clip_share: float | None = None
    """Share of tokens whose ratio is outside the clip range on the side that counts."""
    kl: float | None = None
    """To the reference model, in nats a token."""
    logprob_diff_mean: float | None = None
    """Mean absolute difference of the trainer's and the engine's log-probs."""
    logprob_diff_max: float | None = None
    """The largest such difference."""
    logprob_diff_older: float | None = None
    """Mean of the difference over the tokens that older weights made; None where there are none."""
    logprob_kl: float | None = None
    """k3 estimate of KL(engine || trainer), in nats a token."""
    logprob_beyond_2: float | None = None
    """Share of tokens whose two probabilities differ by more than a factor of 2."""
    logprob_beyond_10: float | None = None
    """Likewise, of 10."""
    tis_weight: float | None = None
    """Mean weight of truncated importance sampling."""
    tis_clip_share: float | None = None
    """Share of tokens whose importance weight was truncated."""
    mtp_loss: float | None = None
    """Cross-entropy of the MTP layer's predictions, in nats a token."""
    mtp_grad_norm: float | None = None
    """Of the MTP layer, before clipping, no part of `grad_norm`; of the last optimizer step."""


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """One evaluation set: share of right answers (with a custom reward function, mean reward) with its 95% confidence
    interval. What a custom reward does not tell is None."""

    reward: float
    ci95_low: float
    ci95_high: float
    samples: int
    response_length: float
    truncated_share: float
    no_answer_share: float | None = None
    """Responses that ended by themselves without an answer that can be found."""
    grader_failed_share: float | None = None
    pass_at_n: float | None = None
    """Share of prompts of which at least one of the n samples is right."""
    maj_at_n: float | None = None
    """Share of prompts of which the commonest answer is right."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """A line of metrics.jsonl. Step n is the loop's n-th rollout and all that follows from it; step 0 is the evaluation
    before the first. `rollout` is None in supervised runs, `train` in step 0."""

    step: int
    rollout: RolloutMetrics | None = None
    train: TrainMetrics | None = None
    evals: Mapping[str, EvalMetrics] = field(default_factory=dict)
    """By the name of the evaluation set."""
    weight_bytes_per_second: float | None = None
    """Of the whole model's weights, to each GPU of an engine; without what the update waits for before and after."""
    seconds: StepSeconds

    def as_line(self) -> dict[str, Scalar]:
        """The flat form: an evaluation's reward is `eval/NAME`, its other values `eval/NAME_...`; what was not computed
        is left out."""
        line: dict[str, Scalar] = {"step": self.step}
        if self.rollout is not None:
            values = asdict(self.rollout)
            rates = enumerate(values.pop("draft_accept_rates"), start=1)
            line |= {name: value for name, value in values.items() if value is not None}
            line |= {f"draft_accept_rate_{depth}": rate for depth, rate in rates}
        if self.train is not None:
            line |= {name: value for name, value in asdict(self.train).items() if value is not None}
        for name, metrics in self.evals.items():
            values = asdict(metrics)
            line[f"eval/{name}"] = values.pop("reward")
            line |= {f"eval/{name}_{key}": value for key, value in values.items() if value is not None}
        return {name: _finite(value) for name, value in line.items()} | self._times()

    def _times(self) -> dict[str, Scalar]:
        times: dict[str, Scalar] = {}
        if self.train is not None:
            times["tokens_per_second"] = self.train.tokens / self.seconds.training
        if self.rollout is not None:
            times["samples_per_second"] = self.rollout.samples / self.seconds.training
        if self.weight_bytes_per_second is not None:
            times["weight_bytes_per_second"] = self.weight_bytes_per_second
        times["seconds_step"] = self.seconds.step
        return times | {f"seconds_{phase}": seconds for phase, seconds in self.seconds.phases.items()}


def _finite(value: Scalar) -> Scalar:
    return value if value is None or math.isfinite(value) else None
