"""Generation of a rollout or an evaluation: prompts in, groups of samples out, in the prompts' order."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Self

from recipe.data.prompts import Prompt
from recipe.rollout.client import ClientCounters, RolloutClient
from recipe.sampling.errors import EngineError, StaleWeights
from recipe.sampling.sample import NO_WEIGHTS, Sample, SampleGroup, added
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.seeds import derive

OnGroup = Callable[[SampleGroup], Awaitable[None]]
"""Called with each group as it completes, in the order of completion: the place to grade it."""

Progress = Callable[[int, int], None]
"""Called with (groups done, groups in all) after each group."""


@dataclass(frozen=True, slots=True)
class SeedStream:
    """The random stream of one generation: its sample seeds are derived from the run's seed and these names alone."""

    seed: int
    names: tuple[str | int, ...]

    def sample_seed(self, group: int, sample: int) -> int:
        """Seed of sample `sample` of the `group`-th prompt."""
        return derive(self.seed, *self.names, group, sample)

    def sample_seeds(self, group: int, count: int) -> tuple[int, ...]:
        """Seeds of the `count` samples of the `group`-th prompt."""
        return tuple(self.sample_seed(group, sample) for sample in range(count))


@dataclass(frozen=True, slots=True)
class GenerationMetrics:
    """Figures of one generation."""

    samples: int
    prompt_tokens: int
    response_tokens: int
    """Generated; what environments said is not counted."""
    seconds: float
    truncated: int
    """Samples cut at the longest response."""
    counters: ClientCounters
    """What went wrong with engines meanwhile, and was mended."""
    accepted_drafts: tuple[int, ...] = ()
    """The engines' steps, a sequence, by the number of draft tokens that were accepted, from 0."""
    course: tuple[tuple[float, int], ...] = ()
    """How many samples were under way; see `recipe.run.conditions.Course`."""
    stale_tokens: int = 0
    """Response tokens of older weights than the rollout's."""
    new_tokens: int = 0
    """Response tokens that were made in these seconds."""

    @classmethod
    def of(
        cls,
        groups: Sequence[SampleGroup],
        version: str,
        seconds: float,
        counters: ClientCounters,
        *,
        ahead: bool = False,
    ) -> Self:
        """The figures of `groups`, made in `seconds` for the weights of `version`: what older weights made was there
        before, unless they were made `ahead`."""
        samples = [sample for group in groups for sample in group.samples]
        response_tokens = sum(sample.generated_length for sample in samples)
        stale_tokens = sum(
            made_under not in (version, NO_WEIGHTS) for sample in samples for made_under in sample.weight_versions
        )
        return cls(
            samples=len(samples),
            prompt_tokens=sum(len(group.prompt.ids) for group in groups),
            response_tokens=response_tokens,
            seconds=seconds,
            truncated=sum(sample.truncated for sample in samples),
            counters=counters,
            accepted_drafts=_all_drafts(samples),
            stale_tokens=stale_tokens,
            new_tokens=response_tokens if ahead else response_tokens - stale_tokens,
        )

    @property
    def truncated_share(self) -> float:
        return self.truncated / self.samples

    @property
    def mean_response_length(self) -> float:
        return self.response_tokens / self.samples

    @property
    def stale_share(self) -> float:
        """Share of the response tokens that were made under older weights."""
        return self.stale_tokens / self.response_tokens

    @property
    def accept_length(self) -> float | None:
        """Tokens a step: the accepted drafts and the one that follows them; None without speculation."""
        steps = sum(self.accepted_drafts)
        accepted = sum(number * count for number, count in enumerate(self.accepted_drafts))
        return 1 + accepted / steps if steps else None

    @property
    def accept_rates(self) -> tuple[float, ...]:
        """Share of the steps in which the first draft token was accepted, the second, and so on."""
        steps = sum(self.accepted_drafts)
        return tuple(sum(self.accepted_drafts[depth:]) / steps for depth in range(1, len(self.accepted_drafts)))

    @property
    def tokens_per_second(self) -> float:
        """Tokens made now; what was made for groups that were not kept is not counted."""
        return self.new_tokens / self.seconds


def _all_drafts(samples: Sequence[Sample]) -> tuple[int, ...]:
    drafts: list[int] = []
    for sample in samples:
        drafts = added(drafts, sample.accepted_drafts)
    return tuple(drafts)


@dataclass(frozen=True, slots=True)
class SamplingMetrics:
    """What became of the prompts that were drawn for a rollout, besides the groups that were kept."""

    dropped_groups: int = 0
    """By the dynamic sampling filter."""
    unused_groups: int = 0
    """Not needed: aborted, or finished too late."""
    refills: int = 0


@dataclass(frozen=True, slots=True)
class Rollout:
    """The groups, in the prompts' order, and how they were made."""

    groups: list[SampleGroup]
    weight_version: str
    metrics: GenerationMetrics
    sampling: SamplingMetrics = SamplingMetrics()


async def generate_rollout(
    client: RolloutClient,
    prompts: Sequence[Prompt],
    *,
    n_samples: int,
    sampling: SamplingParams,
    seeds: SeedStream,
    expected_version: str,
    on_group: OnGroup | None = None,
    progress: Progress | None = None,
) -> Rollout:
    """Samples `n_samples` responses to every prompt; groups are numbered from 0.

    Raises StaleWeights if a token was made under another weight version than `expected_version`, EngineError if a
    sample was aborted or an engine failed for good, and what `on_group` raises. After an error nothing is left running.
    """
    groups = [SampleGroup.of(prompt, number, n_samples) for number, prompt in enumerate(prompts)]
    done = 0

    async def complete(number: int, group: SampleGroup) -> None:
        nonlocal done
        await client.generate(group, sampling, seeds.sample_seeds(number, n_samples))
        check_versions(group, expected_version)
        check_finished(group)
        if on_group is not None:
            await on_group(group)
        done += 1
        if progress is not None:
            progress(done, len(groups))

    before, started = client.counters, time.monotonic()
    async with client.watched() as tasks:
        for number, group in enumerate(groups):
            tasks.create_task(complete(number, group))
    seconds = time.monotonic() - started
    metrics = GenerationMetrics.of(groups, expected_version, seconds, client.counters - before)
    return Rollout(groups, expected_version, metrics)


def check_finished(group: SampleGroup) -> None:
    """Raises EngineError if a sample was aborted."""
    for sample in group.samples:
        if not sample.is_finished:
            raise EngineError(f"sample {sample.index} was aborted by its engine before it was complete")


def check_versions(
    group: SampleGroup,
    expected_version: str,
    lengths_before: Sequence[int] | None = None,
    *,
    max_staleness: int = 0,
) -> None:
    """Raises StaleWeights if the model made a token under other weights than those of `expected_version`, or the
    `max_staleness` versions before it. The first tokens of each sample, `lengths_before` many (default: none), are of
    an earlier rollout."""
    fitting = {NO_WEIGHTS, expected_version}
    if max_staleness:
        fitting |= {str(int(expected_version) - age) for age in range(1, max_staleness + 1)}
    for sample, length in zip(group.samples, lengths_before or [0] * len(group.samples), strict=True):
        stale = set(sample.weight_versions[length:]) - fitting
        if stale:
            wanted = f"version {expected_version}" + (f" or {max_staleness} before it" if max_staleness else "")
            raise StaleWeights(
                f"sample {sample.index} was made under weight version {', '.join(sorted(stale))}, but this rollout "
                f"is for {wanted}: an engine missed a weight update"
            )
