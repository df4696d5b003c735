"""The rollout side of a run: engines, the client that speaks to them, and the grader of what they say."""

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial

from recipe.assembly.inputs import Data
from recipe.cluster import EngineGroup, TrainerGroup
from recipe.config import Config
from recipe.rewards.grader import Grader
from recipe.rollout.admission import Admission
from recipe.rollout.ahead import Ahead, FirstFinished, FixedOrder
from recipe.rollout.client import ClientCounters, RolloutClient
from recipe.rollout.collect import CollectionPlan, NothingToLearn, RolloutCollector
from recipe.rollout.generate import SeedStream
from recipe.sampling.sample import SampleGroup, grade_group
from recipe.sampling.sampling_params import SamplingParams
from recipe.system.threads import in_thread


class RolloutEngines:
    """The rollout side: servers, the client that speaks to them, and the grader of what they say."""

    def __init__(
        self,
        group: EngineGroup,
        client: RolloutClient,
        grader: Grader | None,
        data: Data,
        config: Config,
        done: int,
    ) -> None:
        """`done`: rollouts that are trained."""
        self.client = client
        self._group, self._grader = group, grader
        self._told, self._idle_s = client.counters, client.course.idle_s
        plan, sampling = CollectionPlan.of(config.rollout), SamplingParams.for_rollout(config.rollout)
        self.collector = RolloutCollector(client, data.source, plan, sampling, grade=self.grade, keep=data.keep)
        self._updates_in_flight = config.rollout.update_weight_in_flight is not None
        self.ahead: Ahead | None = None
        """None: nothing is made while the trainer works."""
        if not plan.max_staleness:
            return
        seed, rollouts = config.misc.seed, config.rollout.num_rollout
        if config.rollout.is_in_fixed_order:
            admission = Admission(1, plan.max_staleness, rollouts=rollouts, done=done)
            self.ahead = FixedOrder(self.collector, data.source, plan, admission, partial(rollout_seeds, seed))
        else:
            admission = Admission(plan.groups, plan.max_staleness, rollouts=rollouts, done=done)
            seeds = SeedStream(seed, ("draw",))
            self.ahead = FirstFinished(
                client, data.source, plan, admission, sampling, seeds, grade=self.grade, keep=data.keep
            )

    async def grade(self, group: SampleGroup) -> None:
        """Grades every sample of a complete group."""
        await grade_group(self._grader, group)

    def check_grades(self) -> None:
        """Raises UserError if the grader has failed at every response since the last call."""
        if self._grader is not None:
            self._grader.collect_counts()

    @contextmanager
    def telling_of_graders(self) -> Iterator[None]:
        """A grader that always fails gives equal rewards too, and says so better."""
        try:
            yield
        except NothingToLearn:
            self.check_grades()
            raise

    def changing(self, version: int) -> AbstractAsyncContextManager[None]:
        """The trainer makes the weights of `version` in the block; see `EngineGroup`."""
        return self._group.changing(version)

    async def release_memory(self) -> None:
        """Nothing is generated until the next `update_weights`: engines on the trainer's GPUs make room for it."""
        await in_thread(self._group.release_memory)

    @property
    def waits_for_rollouts(self) -> bool:
        """Whether an update has to wait for what is made ahead: it takes no weights in flight."""
        return self.ahead is not None and not self._updates_in_flight

    async def pause(self) -> None:
        """Waits for what is under way; nothing more is started until the weights are there."""
        assert self.ahead is not None
        await self.ahead.pause()

    async def update_weights(self, trainer: TrainerGroup, version: int) -> None:
        """Sends the policy to all engines; those that do not generate any more are started again for it."""
        trainer.make_room()
        async with self.client.updating(str(version)):
            self.client.move(await in_thread(self._group.update_weights, trainer, version))
        if self.ahead is not None:
            self.ahead.advance(version)

    def begin_end(self) -> None:
        """Nothing is generated any more, and nobody waits for an engine."""
        self._group.begin_end()

    @property
    def weight_bytes_per_second(self) -> float | None:
        """Speed of the last update; see `EngineGroup`."""
        return self._group.weight_bytes_per_second

    @property
    def seconds_paused(self) -> float | None:
        """Time that generation stood still for the last update; see `EngineGroup`."""
        return self._group.seconds_paused

    def new_counts(self) -> ClientCounters:
        """What went wrong with engines and was mended since the last call."""
        before, self._told = self._told, self.client.counters
        return self._told - before

    def new_idle_seconds(self) -> float | None:
        """Time since the last call in which no sample was under way; None where they wait for the trainer anyway."""
        before, self._idle_s = self._idle_s, self.client.course.idle_s
        return None if self.ahead is None else self._idle_s - before


def rollout_seeds(seed: int, rollout_id: int) -> SeedStream:
    """The random stream of a rollout."""
    return SeedStream(seed, ("rollout", rollout_id))
