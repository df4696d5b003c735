"""Generating what an evaluation lacks, every finished sample on the disk before the next thing happens."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from recipe.data.prompts import Prompt
from recipe.errors import UserError
from recipe.rollout.client import RolloutClient
from recipe.rollout.errors import EngineAnswerError, EngineError, EngineUnreachable, StaleWeights
from recipe.rollout.generate import SeedStream
from recipe.rollout.sample import FinishReason, Sample, SampleGroup
from recipe.rollout.sampling_params import SamplingParams
from recipe.run.journal import Journal

SampleKey = tuple[str, int]
"""A problem's name, and the sample's number among the problem's."""


@dataclass(frozen=True)
class StoredSample:
    """A line of samples.jsonl."""

    problem: str
    sample: int
    seed: int
    response: str
    finish_reason: FinishReason
    tokens: int
    """Of the response."""
    weight_version: str

    @property
    def key(self) -> SampleKey:
        return self.problem, self.sample

    @property
    def truncated(self) -> bool:
        """Whether the engine cut it off."""
        return self.finish_reason is FinishReason.LENGTH


class SampleStore:
    """samples.jsonl: a line a finished sample, in the order in which they were finished, each sample once."""

    def __init__(self, path: Path) -> None:
        """Opens the file; a line that a crash left unfinished goes. Raises UserError if it is damaged otherwise."""
        self._journal = Journal(path)
        self._journal.keep(lambda _: True)
        self.samples: dict[SampleKey, StoredSample] = {}
        for record in self._journal.read():
            try:
                sample = StoredSample(**{**record, "finish_reason": FinishReason(record["finish_reason"])})
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path} holds a line that is no sample ({error!r}); remove the line") from error
            if sample.key in self.samples:
                raise UserError(
                    f"{path} holds sample {sample.sample} of problem {sample.problem} twice; remove one line"
                )
            self.samples[sample.key] = sample

    def add(self, sample: StoredSample) -> None:
        """Adds a sample; it is on the disk when this returns."""
        self._journal.append(asdict(sample))
        self.samples[sample.key] = sample


@dataclass(frozen=True)
class Plan:
    """All samples of an evaluation. Their seeds depend on the run's seed, the problem's place in the file and the
    sample's number alone."""

    problems: Sequence[Prompt]
    n_samples: int
    sampling: SamplingParams
    seeds: SeedStream

    def missing(self, store: SampleStore) -> Iterator[tuple[int, int]]:
        """The places (problem, sample) that are not stored: the first sample of every problem, then the second..."""
        for sample in range(self.n_samples):
            for place, problem in enumerate(self.problems):
                if (problem.name, sample) not in store.samples:
                    yield place, sample


OnSample = Callable[[StoredSample], Awaitable[None]]
"""Called with each sample that was made, after it was stored."""


async def generate_missing(
    client: RolloutClient, plan: Plan, store: SampleStore, on_sample: OnSample, *, version: str, max_failures: int
) -> None:
    """Makes and stores the samples that the store lacks.

    A sample that an engine fails to make for good is left out. Raises UserError at the end if there are such, at once
    if there are `max_failures`, if no engine is healthy any more, or if an engine refuses a request or changes its
    weights. What is stored stays.
    """
    failures: list[EngineError] = []

    async def make(place: int, number: int) -> None:
        try:
            sample = await _make(client, plan, place, number, version)
        except (EngineUnreachable, EngineAnswerError) as error:
            failures.append(error)
            if len(failures) >= max_failures or not any(await client.healthy()):
                raise
            return
        store.add(sample)
        await on_sample(sample)

    try:
        async with asyncio.TaskGroup() as tasks:
            for place, number in list(plan.missing(store)):
                tasks.create_task(make(place, number))
    except ExceptionGroup as group:
        for error in group.exceptions:
            if not isinstance(error, EngineError):
                raise error from None
            failures.append(error)
    if failures:
        lacking, total = sum(1 for _ in plan.missing(store)), len(plan.problems) * plan.n_samples
        raise UserError(
            f"{lacking} of {total} samples are missing, the last failure: {failures[-1]}; "
            "the others are stored: mend the server and run the same command again"
        )


async def _make(client: RolloutClient, plan: Plan, place: int, number: int, version: str) -> StoredSample:
    problem, seed = plan.problems[place], plan.seeds.sample_seed(place, number)
    group = SampleGroup(place, problem, (Sample(place * plan.n_samples + number, place, problem),))
    await client.generate(group, plan.sampling, [seed])
    [sample] = group.samples
    if sample.finish_reason is None or sample.finish_reason is FinishReason.ABORT:
        raise EngineAnswerError(f"the engine aborted sample {number} of problem {problem.name}")
    if stale := set(sample.weight_versions) - {version}:
        raise StaleWeights(
            f"sample {number} of problem {problem.name} was made under weight version {', '.join(sorted(stale))}, not "
            f"{version} as the others"
        )
    response = sample.response.encode(errors="replace").decode()
    return StoredSample(problem.name, number, seed, response, sample.finish_reason, sample.response_length, version)
