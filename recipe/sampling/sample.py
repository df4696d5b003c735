"""Samples: what the engines made of a prompt, and all that is known of every token of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import groupby, zip_longest

from recipe.data.prompts import Prompt
from recipe.messages import RoutedExperts
from recipe.rewards import Grade, Grader, GradeRequest, GradeStatus, RewardType
from recipe.system.errors import UserError, shortened


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """An end token or a stop string."""
    LENGTH = "length"
    """The longest response allowed: the text is cut."""
    ABORT = "abort"
    """The engine was told to stop; the response may be continued later."""
    FAILED = "failed"
    """The custom generate function failed at it: there is no response, and nothing is learned from it."""


NO_WEIGHTS = ""
"""In the place of a version: no weights made the token."""


@dataclass(slots=True)
class Sample:
    """One response to a prompt: what the model said and, between its turns, what an environment did. The four per-token
    lists grow together, by `append_model` and `append_environment` and nothing else."""

    index: int
    """Unique in the run."""
    group_index: int
    """The group's number in the run, shared by all samples of one prompt."""
    prompt: Prompt
    response_ids: list[int] = field(default_factory=list)
    loss_mask: list[int] = field(default_factory=list)
    """1: the token is trained on."""
    rollout_log_probs: list[float] = field(default_factory=list)
    """Log-prob of each response token under the engine's weights and sampling temperature; 0 of the environment's."""
    weight_versions: list[str] = field(default_factory=list)
    """Version of the weights that made each response token; NO_WEIGHTS of the environment's."""
    finish_reason: FinishReason | None = None
    matched: int | str | None = None
    """The end token or stop string that ended it."""
    turn_end: FinishReason | None = None
    """Why the model's last turn is over; None while it is not, and when the environment has spoken since."""
    response: str = ""
    """The response as text, without what ended it."""
    accepted_drafts: list[int] = field(default_factory=list)
    """The engine's steps by the number of draft tokens that were accepted, from 0; empty without speculation."""
    engine: int | None = None
    """Number of the engine that made the newest tokens."""
    routed_experts: RoutedExperts | None = None
    """[length - 1, M, K] where the engine took each token when it last read it; the newest token it has not read. None
    where nobody asked, [fewer, M, K] where it did not tell."""
    grade: Grade | None = None

    def append_model(
        self,
        ids: Sequence[int],
        log_probs: Sequence[float],
        versions: Sequence[str],
        *,
        routed_experts: RoutedExperts | None = None,
    ) -> None:
        """Adds tokens that the model generated. `routed_experts` [length - 1, M, K] is that of the whole sample: an
        engine that goes on with it reads all of it again, under the newest weights. Raises ValueError, and adds
        nothing, if the three do not have one length, or it has another."""
        if not len(ids) == len(log_probs) == len(versions):
            raise ValueError(
                f"sample {self.index}: {len(ids)} tokens, {len(log_probs)} log-probs and {len(versions)} versions"
            )
        length = self.length + len(ids)
        if routed_experts is not None and len(routed_experts) != length - 1:
            raise ValueError(f"sample {self.index}: {len(routed_experts)} tokens of {length} are routed, not all but 1")
        if routed_experts is not None:
            self.routed_experts = routed_experts
        self._extend(ids, log_probs, versions, trained=True)

    def append_environment(self, ids: Sequence[int]) -> None:
        """Adds tokens that the model reads and did not generate, a tool's output or a template between two turns: they
        are not trained on, and the response goes on."""
        self._extend(ids, [0.0] * len(ids), [NO_WEIGHTS] * len(ids), trained=False)
        self.finish_reason = self.matched = self.turn_end = None

    def _extend(
        self, ids: Sequence[int], log_probs: Sequence[float], versions: Sequence[str], *, trained: bool
    ) -> None:
        self.response_ids.extend(ids)
        self.loss_mask.extend([int(trained)] * len(ids))
        self.rollout_log_probs.extend(log_probs)
        self.weight_versions.extend(versions)

    def count_drafts(self, steps: Sequence[int]) -> None:
        """Adds steps by the number of draft tokens that were accepted."""
        self.accepted_drafts = added(self.accepted_drafts, steps)

    def cut(self, length: int) -> None:
        """Drops the response tokens after the first `length`."""
        for tokens in (self.response_ids, self.loss_mask, self.rollout_log_probs, self.weight_versions):
            del tokens[length:]
        if self.routed_experts is not None:
            self.routed_experts = self.routed_experts[: self.length - 1]

    def mask_response(self) -> None:
        """Takes the tokens that are there out of training."""
        self.loss_mask = [0] * len(self.loss_mask)

    def fail(self) -> None:
        """Leaves it out of training: drops all that was said."""
        self.cut(0)
        self.response, self.routed_experts, self.grade = "", None, None
        self.finish_reason, self.matched, self.turn_end = FinishReason.FAILED, None, None

    def misalignment(self, vocab_size: int | None) -> str | None:
        """What is wrong with the lists, which somebody may have changed by hand, or with an id outside the vocabulary
        (None: of any size); None if nothing is."""
        ids, log_probs = self.response_ids, self.rollout_log_probs
        lengths = len(ids), len(log_probs), len(self.weight_versions), len(self.loss_mask)
        if len(set(lengths)) > 1:
            named = "the sample has {} response tokens, {} log-probs, {} versions and a loss mask of {}"
            return named.format(*lengths) + ": append_model and append_environment keep them aligned"
        if strange := [one for one in ids if type(one) is not int or one < 0 or (vocab_size and one >= vocab_size)]:
            return f"{shortened(strange[0])} is no token of the vocabulary of {vocab_size}"
        if wrong := [one for one in log_probs if not isinstance(one, float) or not math.isfinite(one)]:
            return f"{shortened(wrong[0])} is no log-prob"
        if any(mask and not made for mask, made in zip(self.loss_mask, self.is_generated, strict=True)):
            return "the loss mask trains on tokens that the model did not generate"
        return None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.prompt.ids

    @property
    def tokens(self) -> list[int]:
        """Prompt and response."""
        return [*self.prompt.ids, *self.response_ids]

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt.ids) + len(self.response_ids)

    @property
    def response_length(self) -> int:
        return len(self.response_ids)

    @property
    def is_generated(self) -> list[bool]:
        """Of each response token, whether the model made it."""
        return [version != NO_WEIGHTS for version in self.weight_versions]

    @property
    def generated_length(self) -> int:
        """Response tokens that the model made."""
        return self.response_length - self.weight_versions.count(NO_WEIGHTS)

    @property
    def turn_start(self) -> int:
        """Where the model's last turn begins in the response: behind what the environment said last."""
        versions = self.weight_versions
        return next((place + 1 for place in reversed(range(len(versions))) if versions[place] == NO_WEIGHTS), 0)

    @property
    def turns(self) -> int:
        """Times that the model has spoken."""
        return sum(is_generated for is_generated, _ in groupby(self.is_generated))

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing to continue."""
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.FAILED)

    @property
    def is_left_out(self) -> bool:
        """Whether nothing is learned from it, and no other sample is compared with it."""
        return self.finish_reason is FinishReason.FAILED

    @property
    def truncated(self) -> bool:
        return self.finish_reason is FinishReason.LENGTH

    @property
    def reward(self) -> float | None:
        """The grade's reward; None before grading. A custom generate function may set it: no grader is asked then."""
        return None if self.grade is None else self.grade.reward

    @reward.setter
    def reward(self, value: float) -> None:
        if not math.isfinite(value):
            raise ValueError(f"the reward of sample {self.index} is {value}")
        self.grade = Grade(float(value), GradeStatus.ENVIRONMENT, None, "")

    @property
    def is_rewarded(self) -> bool:
        """Whether the environment has given its reward."""
        return self.grade is not None and self.grade.status is GradeStatus.ENVIRONMENT


LEFT_OUT = Grade(0.0, GradeStatus.LEFT_OUT, None, "there is no response: the custom generate function failed")


def added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    """Two histograms together."""
    return [one + other for one, other in zip_longest(left, right, fillvalue=0)]


@dataclass(frozen=True, slots=True)
class SampleGroup:
    """All samples of one prompt: the unit of GRPO's advantage, of the prefix cache, and of a request."""

    index: int
    """The group's number in the run."""
    prompt: Prompt
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, prompt: Prompt, index: int, n_samples: int) -> "SampleGroup":
        """A group of empty samples, numbered `index * n_samples` and on."""
        first = index * n_samples
        return cls(index, prompt, tuple(Sample(first + i, index, prompt) for i in range(n_samples)))

    @property
    def is_finished(self) -> bool:
        """Whether all its samples are."""
        return all(sample.is_finished for sample in self.samples)


async def grade_group(grader: Grader | None, group: SampleGroup) -> None:
    """Grades every sample of a complete group that has no reward yet; one that is left out is worth nothing. Raises
    UserError if there is one to grade, and no grader."""
    for sample in group.samples:
        if sample.is_left_out:
            sample.grade = LEFT_OUT
    samples = [sample for sample in group.samples if not (sample.is_left_out or sample.is_rewarded)]
    if not samples:
        return
    if grader is None:
        raise UserError(
            f"--custom-generate-function-path has given sample {samples[0].index} no reward: let it set sample.reward, "
            "or give --rm-type or --custom-rm-path"
        )
    prompt = group.prompt
    rm_type = RewardType(prompt.rm_type) if prompt.rm_type else None
    requests = [
        GradeRequest(prompt.text, sample.response, prompt.label, sample.truncated, rm_type) for sample in samples
    ]
    for sample, grade in zip(samples, await grader.grade_async(requests), strict=True):
        sample.grade = grade
