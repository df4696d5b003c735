"""Generating what an evaluation lacks, every finished sample on the disk before the next thing happens."""

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from recipe.data.prompts import Prompt
from recipe.rollout.client import RolloutClient
from recipe.rollout.generate import SeedStream
from recipe.run.journal import Journal
from recipe.sampling.errors import EngineAnswerError, EngineError, EngineUnreachable, StaleWeights
from recipe.sampling.sample import FinishReason, Sample, SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError

_POLL_S = 15.0

SampleKey = tuple[str, int]
"""A problem's name, and the sample's number among the problem's."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class StoredSample:
    """A line of samples.jsonl."""

    problem: str
    sample: int
    seed: int
    response: str
    finish_reason: FinishReason
    tokens: int
    """Tokens of the response."""
    weight_version: str

    @property
    def key(self) -> SampleKey:
        return self.problem, self.sample

    @property
    def truncated(self) -> bool:
        """Whether the engine cut it off."""
        return self.finish_reason is FinishReason.LENGTH


_SAMPLE = TypeAdapter(StoredSample)


class SampleStore:
    """samples.jsonl: a line a finished sample, in the order in which they were finished, each sample once."""

    def __init__(self, path: Path, n_samples: int) -> None:
        """Opens the file, for so many samples of a problem; a line that a crash left unfinished goes. Raises UserError
        if it is damaged otherwise."""
        self._journal = Journal(path)
        self._journal.keep(lambda _: True)
        self.samples: dict[SampleKey, StoredSample] = {}
        for number, record in enumerate(self._journal.read(), 1):
            try:
                sample = _SAMPLE.validate_json(json.dumps(record), strict=True)
            except ValidationError as error:
                what = error.errors()[0]
                where = ".".join(map(str, what["loc"]))
                raise UserError(
                    f"{path}, line {number}, is no sample ({where}: {what['msg']}); remove the line"
                ) from error
            if not 0 <= sample.sample < n_samples:
                raise UserError(f"{path}, line {number}, is sample {sample.sample} of {n_samples}; remove the line")
            if sample.key in self.samples:
                raise UserError(
                    f"{path} holds sample {sample.sample} of problem {sample.problem} twice; remove one line"
                )
            self.samples[sample.key] = sample

    def add(self, sample: StoredSample) -> None:
        """Adds a sample; it is on the disk when this returns."""
        self._journal.append(dataclasses.asdict(sample))
        self.samples[sample.key] = sample


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class Limits:
    """When generation is given up, so that it ends in bounded time whatever the servers do."""

    max_failures: int
    """Samples that failed for good."""
    health_s: float
    """Seconds in which no engine generates for a health check."""
    stall_s: float
    """Seconds in which no sample is finished."""


OnSample = Callable[[StoredSample], Awaitable[None]]
"""Called with each sample that was made, after it was stored."""


async def generate_missing(
    client: RolloutClient, plan: Plan, store: SampleStore, on_sample: OnSample, *, version: str, limits: Limits
) -> None:
    """Makes and stores the samples that the store lacks.

    A sample that an engine fails to make for good is left out. Raises UserError at the end if there are such, at once
    where a limit is passed, or if an engine refuses a request or changes its weights. What is stored stays.
    """
    failures: list[EngineError] = []
    watch = _Watch(client, limits)

    async def make(place: int, number: int) -> None:
        try:
            sample = await _make(client, plan, place, number, version)
        except (EngineUnreachable, EngineAnswerError) as error:
            failures.append(error)
            if len(failures) >= limits.max_failures or not any(await client.healthy()):
                raise
            return
        store.add(sample)
        watch.note_sample()
        await on_sample(sample)

    try:
        async with asyncio.TaskGroup() as watching:
            watcher = watching.create_task(watch.run())
            async with asyncio.TaskGroup() as tasks:
                for place, number in list(plan.missing(store)):
                    tasks.create_task(make(place, number))
            watcher.cancel()
    except ExceptionGroup as group:
        for error in _leaves(group):
            if not isinstance(error, EngineError):
                raise error from None
            failures.append(error)
    if failures:
        lacking, total = sum(1 for _ in plan.missing(store)), len(plan.problems) * plan.n_samples
        raise UserError(
            f"{lacking} of {total} samples are missing, the last failure: {failures[-1]}; "
            "the others are stored: mend the server and run the same command again"
        )


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


class _Watch:
    """Asks after the engines' health while they generate."""

    def __init__(self, client: RolloutClient, limits: Limits) -> None:
        self._client, self._limits = client, limits
        self._healthy = self._sample = time.monotonic()

    def note_sample(self) -> None:
        """A sample is finished."""
        self._sample = time.monotonic()

    async def run(self) -> None:
        """Raises EngineUnreachable once a limit is passed; never returns."""
        limits = self._limits
        while True:
            await asyncio.sleep(min(_POLL_S, limits.health_s / 4, limits.stall_s / 4))
            if any(await self._client.healthy()):
                self._healthy = time.monotonic()
            now = time.monotonic()
            if now - self._healthy > limits.health_s:
                raise EngineUnreachable(f"no server has passed a health check for {limits.health_s:g} s")
            if now - self._sample > limits.stall_s:
                raise EngineUnreachable(f"the server is healthy, but no sample was finished for {limits.stall_s:g} s")


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
