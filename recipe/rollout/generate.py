"""Generation of a rollout or an evaluation: prompts in, groups of samples out, in the prompts' order."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from recipe.data.prompts import Prompt
from recipe.rollout.client import RolloutClient
from recipe.rollout.errors import EngineError, StaleWeights
from recipe.rollout.sample import FinishReason, SampleGroup
from recipe.rollout.sampling_params import SamplingParams
from recipe.seeds import derive

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


@dataclass(frozen=True, slots=True)
class GenerationMetrics:
    """Figures of one generation."""

    samples: int
    prompt_tokens: int
    response_tokens: int
    seconds: float
    truncated: int
    """Samples cut at the longest response."""
    retries: int
    restarts: int
    """Engines replaced meanwhile."""

    @property
    def truncated_share(self) -> float:
        return self.truncated / self.samples

    @property
    def mean_response_length(self) -> float:
        return self.response_tokens / self.samples

    @property
    def tokens_per_second(self) -> float:
        return self.response_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Rollout:
    """The groups, in the prompts' order, and how they were made."""

    groups: list[SampleGroup]
    metrics: GenerationMetrics


async def generate_rollout(
    client: RolloutClient,
    prompts: Sequence[Prompt],
    *,
    n_samples: int,
    sampling: SamplingParams,
    seeds: SeedStream,
    expected_version: str,
    first_group: int = 0,
    on_group: OnGroup | None = None,
    progress: Progress | None = None,
) -> Rollout:
    """Samples `n_samples` responses to every prompt; groups are numbered from `first_group`.

    Raises StaleWeights if a token was made under another weight version than `expected_version`, EngineError if a
    sample was aborted or an engine failed for good, and what `on_group` raises. After an error nothing is left running.
    """
    groups = [SampleGroup.of(prompt, first_group + number, n_samples) for number, prompt in enumerate(prompts)]
    done = 0

    async def complete(number: int, group: SampleGroup) -> None:
        nonlocal done
        await client.generate(group, sampling, [seeds.sample_seed(number, i) for i in range(n_samples)])
        _check(group, expected_version)
        if on_group is not None:
            await on_group(group)
        done += 1
        if progress is not None:
            progress(done, len(groups))

    retries, restarts = client.counters.retries, client.counters.restarts
    started = time.monotonic()
    try:
        async with asyncio.TaskGroup() as tasks:
            for number, group in enumerate(groups):
                tasks.create_task(complete(number, group))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    samples = [sample for group in groups for sample in group.samples]
    return Rollout(
        groups,
        GenerationMetrics(
            samples=len(samples),
            prompt_tokens=sum(len(group.prompt.ids) for group in groups),
            response_tokens=sum(sample.response_length for sample in samples),
            seconds=time.monotonic() - started,
            truncated=sum(sample.truncated for sample in samples),
            retries=client.counters.retries - retries,
            restarts=client.counters.restarts - restarts,
        ),
    )


def _check(group: SampleGroup, expected_version: str) -> None:
    for sample in group.samples:
        if sample.finish_reason is FinishReason.ABORT:
            raise EngineError(f"sample {sample.index} was aborted by its engine before it was complete")
        stale = set(sample.weight_versions) - {expected_version}
        if stale:
            raise StaleWeights(
                f"sample {sample.index} was made under weight version {', '.join(sorted(stale))}, but this rollout "
                f"is for version {expected_version}: an engine missed a weight update"
            )
