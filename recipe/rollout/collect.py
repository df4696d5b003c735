"""The rollout of a training step: prompts are drawn and sampled until enough groups are worth learning from; what is
under way then is aborted.

A group that the filter drops is replaced: once it is certain that the groups on their way do not suffice, as many
prompts as at first are drawn again. Groups that are neither kept nor dropped give their prompts back to the source or,
with partial rollouts, wait with the tokens they have for the next rollout, which continues them first.

Which groups are kept. Without over-sampling and partial rollouts: the first that pass the filter, in the order in which
their prompts were drawn. With seeds by name, the rollout is then the same in every run, also in one that was resumed,
if the engine's samples depend on their seeds alone (the embedded engine's do). With over-sampling or partial rollouts:
the first to finish, which is a matter of time.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from recipe.config import RolloutConfig
from recipe.data.source import Draws
from recipe.rollout.client import RolloutClient
from recipe.rollout.filters import FLAG as FILTER_FLAG
from recipe.rollout.filters import GroupFilter
from recipe.rollout.generate import (
    GenerationMetrics,
    OnGroup,
    Rollout,
    SamplingMetrics,
    SeedStream,
    check_finished,
    check_versions,
)
from recipe.rollout.pending import PendingGroup
from recipe.rollout.selection import Selection
from recipe.sampling.sample import SampleGroup
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.errors import UserError
from recipe.system.threads import in_thread


class NothingToLearn(UserError):
    """Too few groups passed the filter."""


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """How many groups are drawn and kept, and what becomes of the others."""

    groups: int
    """To keep."""
    n_samples: int
    draw_size: int
    """Prompts drawn at first, and by each refill."""
    in_order: bool = True
    """Keep the first groups drawn, not the first to finish."""
    max_refills: int = 10
    partial: bool = False
    """Aborted groups go on in the next rollout."""
    mask_older: bool = False
    """Tokens of earlier rollouts are not trained on."""
    max_staleness: int = 0
    """Versions that a token may lie behind the rollout's; above 0 rollouts are made ahead."""

    @classmethod
    def of(cls, rollout: RolloutConfig) -> Self:
        return cls(
            groups=rollout.rollout_batch_size,
            n_samples=rollout.n_samples_per_prompt,
            draw_size=rollout.draw_size,
            in_order=rollout.keeps_in_order,
            max_refills=rollout.dynamic_sampling_max_refills,
            partial=rollout.partial_rollout,
            mask_older=rollout.mask_offpolicy_in_partial_rollout,
            max_staleness=rollout.staleness,
        )


class RolloutCollector:
    """Makes one rollout after another; between them it holds the groups that wait to be continued."""

    def __init__(
        self,
        client: RolloutClient,
        source: Draws,
        plan: CollectionPlan,
        sampling: SamplingParams,
        *,
        grade: OnGroup,
        keep: GroupFilter | None = None,
    ) -> None:
        self._client, self._source, self._plan, self._sampling = client, source, plan, sampling
        self._grade = grade
        self._keep: GroupFilter = keep or (lambda _: True)
        self._waiting: list[PendingGroup] = []

    def state(self) -> list[dict[str, Any]]:
        """The waiting groups, for a checkpoint."""
        return [pending.as_json() for pending in self._waiting]

    def load_state(self, state: Sequence[dict[str, Any]]) -> None:
        """Takes over the waiting groups of a checkpoint, whose source must be loaded. Raises UserError if they are of
        another size than this run's: samples are numbered by it."""
        waiting = [PendingGroup.from_json(content, self._source.prompt_of) for content in state]
        sizes = {len(pending.seeds) for pending in waiting} - {self._plan.n_samples}
        if sizes:
            raise UserError(
                f"in the checkpoint {len(waiting)} groups of {max(sizes)} samples wait to be continued, and "
                f"--n-samples-per-prompt is {self._plan.n_samples}: resume with --n-samples-per-prompt {max(sizes)}"
            )
        self._waiting = waiting

    async def collect(self, seeds: SeedStream, expected_version: str) -> Rollout:
        """The next rollout, graded, for the weights of `expected_version`. Raises NothingToLearn if too few groups pass
        the filter, StaleWeights if an engine holds weights that these are too far from, EngineError if one failed for
        good, and what grading raises. After an error nothing is left running."""
        before, started = self._client.counters, time.monotonic()
        self._client.course.begin()
        selection = Selection(self._plan.groups, in_order=self._plan.in_order)
        groups: list[PendingGroup] = []
        finished: asyncio.Queue[int] = asyncio.Queue()
        draws = 0

        async def complete(number: int) -> None:
            if await self._complete(groups[number], expected_version, selection):
                finished.put_nowait(number)

        async with self._client.watched() as tasks:
            while not selection.is_complete:
                while selection.needs_more:
                    self._check_refills(draws, selection, groups)
                    draws += 1
                    for number, pending in enumerate(self._next_groups(seeds, len(groups)), start=len(groups)):
                        groups.append(pending)
                        selection.submit()
                        tasks.create_task(complete(number))
                number = await finished.get()
                selection.decide(number, await in_thread(self._keep, groups[number].group))
            await self._client.drain()
        self._put_aside([groups[number] for number in selection.unused])
        kept = sorted((groups[number].group for number in selection.kept), key=lambda group: group.index)
        check_failures(kept, self._client)
        seconds = time.monotonic() - started
        ahead = self._plan.max_staleness > 0
        return Rollout(
            kept,
            expected_version,
            replace(
                GenerationMetrics.of(kept, expected_version, seconds, self._client.counters - before, ahead=ahead),
                course=self._client.course.points(),
            ),
            SamplingMetrics(len(selection.dropped), len(selection.unused), draws - 1),
        )

    def _next_groups(self, seeds: SeedStream, first: int) -> list[PendingGroup]:
        """As many groups as are drawn at a time, those that wait before new ones. They are numbered in this rollout
        from `first`, which names the seeds of the new ones."""
        plan = self._plan
        again, self._waiting = self._waiting[: plan.draw_size], self._waiting[plan.draw_size :]
        draws = self._source.draw(plan.draw_size - len(again))
        return again + [
            PendingGroup(
                SampleGroup.of(draw.prompt, draw.number, plan.n_samples), seeds.sample_seeds(number, plan.n_samples)
            )
            for number, draw in enumerate(draws, start=first + len(again))
        ]

    async def _complete(self, pending: PendingGroup, expected_version: str, selection: Selection) -> bool:
        """Samples and grades a group. Whether it came in time: when all that is needed is there it may be aborted, and
        is not graded."""
        group = pending.group
        borders = [sample.response_length for sample in group.samples]
        if self._plan.mask_older:
            for sample in group.samples:
                sample.mask_response()
        await self._client.generate(group, self._sampling, pending.seeds, routed=True)
        check_versions(group, expected_version, borders, max_staleness=self._plan.max_staleness)
        if selection.is_complete:
            return False
        check_finished(group)
        await self._grade(group)
        return True

    def _put_aside(self, unused: Sequence[PendingGroup]) -> None:
        """Keeps what may be continued. A finished group whose tokens would all be masked teaches nothing."""
        waits = [
            pending.is_begun and not (self._plan.mask_older and pending.group.is_finished) and self._plan.partial
            for pending in unused
        ]
        self._source.put_back(p.group.index for p, wait in zip(unused, waits, strict=True) if not wait)
        self._waiting += [pending for pending, wait in zip(unused, waits, strict=True) if wait]
        self._waiting.sort(key=lambda pending: pending.group.index)

    def _check_refills(self, draws: int, selection: Selection, groups: Sequence[PendingGroup]) -> None:
        if draws <= self._plan.max_refills:
            return
        dropped = [groups[number].group for number in selection.dropped]
        check_failures(dropped, self._client)
        raise nothing_to_learn(dropped, len(groups), draws, self._plan.groups)


def check_failures(groups: Sequence[SampleGroup], client: RolloutClient) -> None:
    """Raises UserError if the custom generate function failed at every sample."""
    if groups and all(sample.is_left_out for group in groups for sample in group.samples):
        raise UserError(f"no sample of a rollout could be generated, the last one: {client.last_failure}")


def nothing_to_learn(dropped: Sequence[SampleGroup], groups: int, draws: int, wanted: int) -> NothingToLearn:
    """What the filter has `dropped` of so many groups, which were drawn in so many draws to keep those `wanted`."""
    rewards = [{sample.reward for sample in group.samples} for group in dropped]
    equal = Counter(of_group.pop() for of_group in rewards if len(of_group) == 1)
    alike = ", ".join(f"{count} with reward {reward} throughout" for reward, count in equal.most_common(3))
    return NothingToLearn(
        f"{FILTER_FLAG} dropped {len(dropped)} of {groups} groups ({alike or 'none with equal rewards'}) in "
        f"{draws} draws of prompts, and {wanted} were to be kept: the prompts are too easy or too hard "
        "for the policy, or the reward is not the right one; change --prompt-data or the reward, raise "
        "--n-samples-per-prompt, or allow more refills with --dynamic-sampling-max-refills"
    )
