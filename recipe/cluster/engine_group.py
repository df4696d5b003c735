"""All rollout servers of a run: they start, take weights and are replaced, each by the actor that owns it."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import ray
from ray.actor import ActorHandle

from recipe.cluster.calls import ActorDied, get, raise_failure
from recipe.cluster.engine_actor import (
    ENDS,
    START_ATTEMPTS,
    THE_REST,
    WEIGHTS,
    EngineActor,
    EngineEnded,
    start_again,
)
from recipe.cluster.multi_node_engine import APPEARS_WITHIN_S
from recipe.cluster.placement import Placement
from recipe.cluster.trainer_group import TrainerGroup
from recipe.config import Resolved
from recipe.system.errors import UserError
from recipe.system.threads import in_thread
from recipe.weight_sync.result import UpdateResult

logger = logging.getLogger(__name__)

END_S = 8.0
"""Time that the owners of engines have to end them, before they are killed with them."""


def deliver(
    numbers: Sequence[int],
    send: Callable[[Sequence[int]], UpdateResult],
    urls: Sequence[str],
    start_again: Callable[[int], None],
) -> UpdateResult:
    """Sends weights by `send` to engines `numbers`, of which those that fail over it are started again, which changes
    `urls`, and get them again with those that have not got all. Returns what became of the last time. Raises UserError
    if that goes on for START_ATTEMPTS."""
    if not numbers:
        return UpdateResult()
    for _ in range(START_ATTEMPTS):
        result = send(numbers)
        if not result.failed:
            return result
        failed = [number for number in numbers if urls[number] in result.failed]
        incomplete = [number for number in numbers if urls[number] in result.incomplete]
        reasons = [result.failed[urls[number]] for number in failed]
        for number, reason in zip(failed, reasons, strict=True):
            logger.warning("engine %d failed while it was sent weights (%s): it is started again", number, reason)
            start_again(number)
        numbers = sorted([*failed, *incomplete])
    raise UserError(
        f"engine {failed[0]} failed in {START_ATTEMPTS} attempts to send it the weights, the last time since "
        f"{reasons[0]}; see its log"
    )


class EngineGroup:
    """All engines of a run. Use as a context manager: leaving it ends them."""

    def __init__(self, resolved: Resolved, placement: Placement) -> None:
        self._resolved, self._placement = resolved, placement
        self._actors = [self._owner(number) for number in range(resolved.config.num_engines)]
        self._shares_gpus = resolved.config.cluster.colocate
        self._starting: list[ray.ObjectRef] = []
        self._urls: list[str] = []
        self._weights: tuple[TrainerGroup, str] | None = None
        self.weight_bytes_per_second: float | None = None
        """Of the last update, to each GPU of the slowest engine; None where it went by the disk."""
        self._sending = asyncio.Lock()
        self._ending: dict[ray.ObjectRef, ActorHandle] = {}
        self._ended = threading.Event()

    def _owner(self, number: int) -> ActorHandle:
        actor: Any = ray.remote(concurrency_groups={ENDS: 1})(EngineActor)  # type: ignore[call-overload]
        seat, *others = self._placement.seats(number)
        owner: ActorHandle = actor.options(name=f"engine {number}", **seat.options).remote(
            self._resolved, number, seat.gpus, others
        )
        return owner

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.begin_end()
        _, late = ray.wait(list(self._ending), num_returns=len(self._ending), timeout=END_S)
        for reference in late:
            ray.kill(self._ending[reference])

    def begin_end(self) -> None:
        """Ends the engines for good, without waiting for that: also those that hang, are just starting or take weights,
        so that nobody waits for them any more. Whoever starts one raises EngineEnded."""
        self._ended.set()
        self._ending |= {actor.stop.remote(): actor for actor in self._actors}

    def begin_start(self) -> None:
        """Lets the engines start, without waiting for them."""
        self._starting = [actor.start.remote() for actor in self._actors]

    def have_started(self) -> bool:
        """Whether `finish_start` has nothing to wait for. Raises UserError if an engine did not become healthy."""
        done, starting = ray.wait(self._starting, num_returns=len(self._starting), timeout=0)
        for reference in done:
            raise_failure(reference, self._names[self._starting.index(reference)])
        return not starting

    def finish_start(self) -> list[str]:
        """Waits for `begin_start`. Returns the engines' addresses. Raises UserError if one does not become healthy."""
        self._urls = get(self._starting, self._names)
        return list(self._urls)

    def release_memory(self) -> None:
        """Has idle engines that share the trainer's GPUs give back their memory; `update_weights` has them take it
        again."""
        if self._shares_gpus:
            releasing: list[ray.ObjectRef] = [actor.release_memory.remote() for actor in self._actors]
            for reference, name in zip(releasing, self._names, strict=True):
                with suppress(ActorDied):
                    get([reference], [name])

    def replace_dead(self) -> list[str]:
        """Starts engines again that have died or hang, for a time in which nothing is generated: they hold no trained
        weights then. Returns the addresses of all. Raises UserError if one does not become healthy."""
        return self._all("keep_alive")

    def update_weights(self, trainer: TrainerGroup, version: int) -> list[str]:
        """Sends the policy to every engine; one that fails over it is started again. Returns the addresses of all."""
        self._weights = trainer, str(version)
        self._resume_memory(WEIGHTS)
        self.weight_bytes_per_second = self._deliver(range(len(self._urls))).bytes_per_second
        self._deliver(self._resume_memory(THE_REST))
        return list(self._urls)

    def _resume_memory(self, tags: Sequence[str]) -> list[int]:
        """The numbers of the engines that had to be started again for it."""
        if not self._shares_gpus:
            return []
        before = list(self._urls)
        return [number for number, url in enumerate(self._all("resume_memory", tags)) if url != before[number]]

    async def recover(self, url: str) -> str:
        """Replaces the engine at `url` by a new one that holds the current weights, which the trainer still has: it
        does nothing else while something is generated. Returns the new address. Raises UserError if that fails."""
        number = self._urls.index(url)
        logger.warning("engine %d at %s does not generate any more: it is started again", number, url)
        await in_thread(self._start_again, number)
        if self._weights is not None:
            async with self._sending:
                await in_thread(self._deliver, [number])
        return self._urls[number]

    def _deliver(self, numbers: Iterable[int]) -> UpdateResult:
        """Sends the current weights to these engines."""
        assert self._weights is not None
        trainer, version = self._weights
        return deliver(
            list(numbers),
            lambda some: trainer.update_weights({number: self._urls[number] for number in some}, version),
            self._urls,
            self._start_again,
        )

    def _start_again(self, number: int) -> None:
        self._urls[number] = start_again(self._names[number], self._start(number))

    def _start(self, number: int) -> Callable[[], str]:
        timeout_s = APPEARS_WITHIN_S + self._resolved.config.rollout.rollout_engine_start_timeout_s

        def start() -> str:
            self._check_wanted()
            try:
                return str(get([self._actors[number].start.remote()], [self._names[number]], timeout_s)[0])
            except ActorDied:
                self._replace_owner(number)
                raise

        return start

    def _all(self, verb: str, *arguments: Any) -> list[str]:
        """The address that each owner answers with. Where the owner died, the engine, which died with it, is started
        again by another one."""
        references = [getattr(actor, verb).remote(*arguments) for actor in self._actors]
        for number, reference in enumerate(references):
            try:
                [self._urls[number]] = get([reference], [self._names[number]])
            except ActorDied:
                logger.warning("the owner of engine %d died, and the engine with it: both are started again", number)
                self._replace_owner(number)
                self._start_again(number)
        return list(self._urls)

    def _check_wanted(self) -> None:
        if self._ended.is_set():
            raise EngineEnded("the run is over")

    def _replace_owner(self, number: int) -> None:
        self._check_wanted()
        ray.kill(self._actors[number])
        self._actors[number] = self._owner(number)

    @property
    def _names(self) -> list[str]:
        return [f"engine {number}" for number in range(len(self._actors))]
