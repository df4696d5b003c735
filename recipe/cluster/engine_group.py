"""All rollout servers of a run, and every decision on their lives: when one is started, is dead, or is given up."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import ray
from ray.actor import ActorHandle

from recipe.cluster.calls import ActorDied, get
from recipe.cluster.engine_actor import ENDS, THE_REST, WEIGHTS, EngineActor, EngineEnded
from recipe.cluster.engine_nodes import APPEARS_WITHIN_S
from recipe.cluster.placement import Placement
from recipe.cluster.trainer_group import TrainerGroup
from recipe.config import Resolved
from recipe.engines.process import PortTaken
from recipe.system.errors import UserError
from recipe.system.threads import in_thread
from recipe.weight_sync.result import UpdateResult

logger = logging.getLogger(__name__)

STARTS_IN_A_ROW = 3
"""Times that an engine is started before the run gives up. Counted anew once it has worked: it took weights, and then
answered."""
END_S = 8.0
"""Time that actors have to end their engines, before they are killed with them."""


@dataclass(slots=True)
class EngineLife:
    """What the group knows of an engine, through all its starts."""

    number: int
    actor: ActorHandle
    url: str | None = None
    """Its address since it last became healthy; None before the first time."""
    starts: int = 0
    """Since it last worked."""

    @property
    def name(self) -> str:
        """As users are told of it."""
        return f"engine {self.number}"


class EngineGroup:
    """All engines of a run, by number. Use as a context manager: leaving it ends them."""

    def __init__(self, resolved: Resolved, placement: Placement) -> None:
        self._resolved, self._placement = resolved, placement
        self._engines = [EngineLife(number, self._new_actor(number)) for number in range(resolved.config.num_engines)]
        self._shares_gpus = resolved.config.cluster.colocate
        self._starting: dict[int, ray.ObjectRef] = {}
        self._weights: tuple[TrainerGroup, str] | None = None
        self.weight_bytes_per_second: float | None = None
        """Speed of the last update, to each GPU of the slowest engine; None where it went by the disk."""
        self.seconds_paused: float | None = None
        """Time that generation stood still for the last update, at most; None where nothing was under way."""
        self._sending = asyncio.Lock()
        self._ending: dict[ray.ObjectRef, ActorHandle] = {}
        self._ended = threading.Event()

    def _new_actor(self, number: int) -> ActorHandle:
        actor: Any = ray.remote(concurrency_groups={ENDS: 1})(EngineActor)  # type: ignore[call-overload]
        seat, *others = self._placement.seats(number)
        handle: ActorHandle = actor.options(name=f"engine {number}", **seat.options).remote(
            self._resolved, number, seat.gpus, others
        )
        return handle

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
        self._ending |= {engine.actor.stop.remote(): engine.actor for engine in self._engines}

    def begin_start(self) -> None:
        """Lets the engines start, without waiting for them."""
        self._starting = {engine.number: self._order_start(engine) for engine in self._engines}

    def have_started(self) -> bool:
        """Whether `finish_start` has nothing to wait for. Raises UserError if an engine did not become healthy."""
        if self._starting:
            done, _ = ray.wait(list(self._starting.values()), num_returns=len(self._starting), timeout=0)
            for number in [number for number, reference in self._starting.items() if reference in done]:
                self._take_start(self._starting, number)
        return not self._starting

    def finish_start(self) -> list[str]:
        """Waits for `begin_start`. Returns the engines' addresses. Raises UserError if one does not become healthy."""
        while not self.have_started():
            ray.wait(list(self._starting.values()))
        return self.urls

    @property
    def urls(self) -> list[str]:
        """The present addresses of all engines, which have started, in the order of their numbers."""
        return [self._url(engine.number) for engine in self._engines]

    def release_memory(self) -> None:
        """Has idle engines that share the trainer's GPUs give back their memory; `update_weights` has them take it
        again. One that does not is ended: it is in the trainer's way."""
        if self._shares_gpus:
            for number in self._failing("release_memory"):
                logger.warning("engine %d does not give its memory back: it is ended", number)
                get([self._engines[number].actor.kill.remote()], [self._engines[number].name])

    def update_weights(self, trainer: TrainerGroup, version: int) -> list[str]:
        """Sends the policy to every engine. Those that died while nothing was generated are started again before, and
        those that fail over it as it shows. Returns the addresses of all. Raises UserError if one is given up."""
        self._weights = trainer, str(version)
        self._replace_dead()
        self._resume_memory(WEIGHTS)
        result = self._deliver(range(len(self._engines)))
        self.weight_bytes_per_second, self.seconds_paused = result.bytes_per_second, result.paused_s
        self._deliver(self._resume_memory(THE_REST))
        return self.urls

    @asynccontextmanager
    async def changing(self, version: int) -> AsyncIterator[None]:
        """In the block the trainer makes the weights of `version` out of the current ones: it sends none meanwhile to
        an engine that was started again, which gets the new ones when the block is left."""
        async with self._sending:
            yield
            assert self._weights is not None
            self._weights = self._weights[0], str(version)

    def on_answer(self, number: int) -> None:
        """The client has samples of this engine, which it speaks to only once that has taken weights: it works."""
        self._engines[number].starts = 0

    async def on_silent(self, number: int) -> str:
        """The client finds that this engine does not generate: it is dead, and is replaced by one that holds the
        current weights, which the trainer still has, or those that it is `changing` them into. Returns the new address.
        Raises UserError if the engine is given up."""
        await in_thread(self._replace, {number: "does not generate any more"})
        async with self._sending:
            await in_thread(self._deliver, [number])
        return self._url(number)

    def _replace_dead(self) -> None:
        self._replace(dict.fromkeys(self._failing("works"), "does not generate any more"))

    def _resume_memory(self, tags: Sequence[str]) -> list[int]:
        """The engines that had to be started again for it."""
        if not self._shares_gpus:
            return []
        failing = self._failing("resume_memory", tags)
        self._replace(dict.fromkeys(failing, "does not take its memory again"))
        return failing

    def _deliver(self, numbers: Collection[int]) -> UpdateResult:
        """Sends the current weights to these engines, and again to those that failed over it, once they are started
        again. Returns what became of the last time, and how long they stood still the first time."""
        rounds = [UpdateResult()]
        while numbers:
            rounds.append(self._send_and_continue(numbers))
            failed = rounds[-1].failed
            self._replace({n: f"failed while it was sent weights ({why})" for n, why in failed.items()})
            numbers = sorted(failed)
        return replace(rounds[-1], paused_s=rounds[:2][-1].paused_s)

    def _send_and_continue(self, numbers: Collection[int]) -> UpdateResult:
        """As `_send`. Engines that stand still for it go on then, also if the trainer fails."""
        if self._resolved.config.rollout.update_weight_in_flight is None:
            return self._send(numbers)
        result = UpdateResult()
        try:
            result = self._send(numbers)
        finally:
            sent = time.monotonic()
            present = [number for number in numbers if number not in result.failed]
            silent = self._failing("continue_generation", of=present)
        result += UpdateResult(dict.fromkeys(silent, "it did not go on"))
        return replace(result, paused_s=(result.paused_s or 0.0) + time.monotonic() - sent)

    def _send(self, numbers: Collection[int]) -> UpdateResult:
        """Sends the current weights to these engines, and again to those that lost them when another one failed. Raises
        UserError if one that is well does not take them."""
        assert self._weights is not None
        trainer, version = self._weights
        result = trainer.update_weights({number: self._url(number) for number in numbers}, version)
        result.check_taken()
        sent = time.monotonic()
        while again := result.incomplete:
            more = trainer.update_weights({number: self._url(number) for number in again}, version)
            more.check_taken()
            result = replace(more, failed={**result.failed, **more.failed}, paused_s=result.paused_s)
        if result.paused_s is None:
            return result
        return replace(result, paused_s=result.paused_s + time.monotonic() - sent)

    def _failing(self, verb: str, *arguments: Any, of: Collection[int] | None = None) -> list[int]:
        """The engines (of these numbers; default: all) whose actors answer a verb with False, or are dead and now
        replaced by others without a server."""
        asked = self._engines if of is None else [self._engines[number] for number in of]
        references = [getattr(engine.actor, verb).remote(*arguments) for engine in asked]
        failing = []
        for engine, reference in zip(asked, references, strict=True):
            try:
                [works] = get([reference], [engine.name])
            except ActorDied:
                self._replace_actor(engine)
                works = False
            if not works:
                failing.append(engine.number)
        return failing

    def _replace(self, dead: Mapping[int, str]) -> None:
        """Starts dead engines again, all at once, until they are healthy. `dead`: what is wrong with each. Raises
        UserError if one is given up."""
        starting = {number: self._order_start(self._engines[number], why) for number, why in dead.items()}
        while starting:
            self._take_start(starting, next(iter(starting)))

    def _order_start(self, engine: EngineLife, why: str = "") -> ray.ObjectRef:
        """Has an engine start, or start again; `why`: what is wrong with it. Raises UserError if it is given up."""
        if self._ended.is_set():
            raise EngineEnded("the run is over")
        if engine.starts == STARTS_IN_A_ROW:
            raise UserError(
                f"{engine.name} {why}: it has been started {STARTS_IN_A_ROW} times in a row and has not worked since; "
                f"see its logs in {self._resolved.config.run_dir / 'logs'}"
            )
        engine.starts += 1
        if why:
            logger.warning("%s %s: it is started again (%d of %d)", engine.name, why, engine.starts, STARTS_IN_A_ROW)
        return engine.actor.start.remote()

    def _take_start(self, starting: dict[int, ray.ObjectRef], number: int) -> None:
        """Waits for a start, and orders another one if it failed: an engine that never was healthy is tried again for
        want of a port only. Raises UserError if it is given up."""
        engine = self._engines[number]
        timeout_s = APPEARS_WITHIN_S + self._resolved.config.rollout.rollout_engine_start_timeout_s
        try:
            [engine.url] = get([starting.pop(number)], [engine.name], timeout_s)
        except UserError as error:
            if engine.url is None and not isinstance(error, PortTaken):
                raise
            if isinstance(error, ActorDied):
                self._replace_actor(engine)
            starting[number] = self._order_start(engine, f"does not start ({error})")

    def _replace_actor(self, engine: EngineLife) -> None:
        if self._ended.is_set():
            raise EngineEnded("the run is over")
        ray.kill(engine.actor)
        engine.actor = self._new_actor(engine.number)

    def _url(self, number: int) -> str:
        url = self._engines[number].url
        assert url is not None
        return url
