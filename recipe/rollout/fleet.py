"""The engines as the client sees them: which of them takes a request, and which of them is reported as silent."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from recipe.config import RolloutConfig
from recipe.sampling.errors import EngineUnreachable

T = TypeVar("T")

OnSilent = Callable[[int], Awaitable[str]]
"""Told the number of an engine that does not generate, whose owner starts it again; answers with the address at which
it holds the current weights."""

ASK_AGAIN_S = 0.5
"""After a check that failed, before the second one, after which the engine is reported."""

IsHealthy = Callable[["EnginePeer", float], Awaitable[bool]]
"""Whether an engine generates, found out within so many seconds."""


@dataclass(frozen=True, slots=True)
class HealthOptions:
    """How engines are watched while they generate. One that hangs is found after `interval_s` + 2 * `timeout_s`."""

    interval_s: float = 30.0
    timeout_s: float = 30.0
    first_wait_s: float = 0.0
    """Time after its start in which an engine is not asked."""

    @classmethod
    def of(cls, rollout: RolloutConfig) -> Self:
        return cls(
            interval_s=rollout.rollout_health_check_interval,
            timeout_s=rollout.rollout_health_check_timeout,
            first_wait_s=rollout.rollout_health_check_first_wait,
        )


class EnginePeer:
    """An engine that requests are sent to. Its address changes whenever it is started again, its number never."""

    def __init__(self, number: int, url: str) -> None:
        self.number = number
        self.url = url
        self.started = time.monotonic()
        self.load = 0
        """Samples under way."""
        self.doubts = 0
        """Unanswered requests after which it is examined now."""
        self.restarts = 0
        self.requests: set[asyncio.Future[Any]] = set()
        self.replacement: asyncio.Task[None] | None = None
        """Under way, or failed: meanwhile it takes no requests."""

    def move(self, url: str) -> None:
        """It was started again, at `url`."""
        self.url, self.started = url.rstrip("/"), time.monotonic()
        self.restarts += 1
        self.replacement = None

    def is_as_after(self, restarts: int) -> bool:
        """Whether it has not been replaced since it had so many restarts."""
        return self.replacement is None and self.restarts == restarts

    async def answer(self, request: Coroutine[Any, Any, T]) -> T:
        """The result of a request to it. Raises EngineUnreachable if it is found dead meanwhile, though its connections
        may still be open."""
        task = asyncio.ensure_future(request)
        self.requests.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if task.cancelled() and not _is_cancelled():
                raise EngineUnreachable(f"{self.url} does not generate any more") from None
            raise
        finally:
            self.requests.discard(task)


def _is_cancelled() -> bool:
    current = asyncio.current_task()
    return current is not None and current.cancelling() > 0


class Fleet:
    """All engines of a run, in one event loop."""

    def __init__(
        self, urls: Sequence[str], is_healthy: IsHealthy, on_silent: OnSilent | None, options: HealthOptions
    ) -> None:
        self.engines = [EnginePeer(number, url.rstrip("/")) for number, url in enumerate(urls)]
        self._is_healthy = is_healthy
        self._on_silent = on_silent
        self._options = options
        self._may_be_examined = asyncio.Event()
        self._may_be_examined.set()
        self._updates = 0

    @asynccontextmanager
    async def updating(self) -> AsyncIterator[None]:
        """Engines may stand still to take weights: whoever sends these finds out which are dead, and nobody else. Waits
        for replacements under way before. Raises what one failed with."""
        await self.settle()
        self._updates += 1
        self._may_be_examined.clear()
        try:
            yield
        finally:
            self._may_be_examined.set()

    async def least_loaded(self) -> EnginePeer:
        """The engine with the fewest samples under way (the first of several), once there is one, of those that answer.
        Raises what a replacement failed with."""
        while True:
            away = [engine.replacement for engine in self.engines if engine.replacement is not None]
            for replacement in away:
                if replacement.done():
                    replacement.result()
            present = [engine for engine in self.engines if engine.replacement is None]
            if present:
                return min(present, key=lambda engine: (engine.doubts > 0, engine.load))
            await asyncio.wait(away, return_when=asyncio.FIRST_COMPLETED)

    async def examine(self, engine: EnginePeer, restarts: int) -> bool:
        """After an unanswered request to `engine` when it had had so many restarts: reports it if it does not
        generate, asked twice, and not before it has had its first wait; others are preferred meanwhile. Whether it is
        the same as before, and well."""
        if self._on_silent is None:
            return True
        engine.doubts += 1
        try:
            return await self._examine(engine, restarts)
        finally:
            engine.doubts -= 1

    async def _examine(self, engine: EnginePeer, restarts: int) -> bool:
        for wait in (engine.started + self._options.first_wait_s - time.monotonic(), ASK_AGAIN_S):
            await asyncio.sleep(wait)
            if not engine.is_as_after(restarts) or await self._generates(engine):
                return engine.is_as_after(restarts)
        # Nothing is waited for in between: an update that begins meanwhile would replace it, too.
        if engine.is_as_after(restarts):
            self._report(engine)
        return False

    async def _generates(self, engine: EnginePeer) -> bool:
        """Asked when no weights are on their way to it; an answer that these delayed counts for nothing."""
        while True:
            await self._may_be_examined.wait()
            updates = self._updates
            if await self._is_healthy(engine, self._options.timeout_s):
                return True
            if updates == self._updates:
                return False

    async def watch(self) -> None:
        """Asks every engine again and again, for ever, and reports those that do not generate. Raises what a
        replacement failed with."""
        async with asyncio.TaskGroup() as tasks:
            for engine in self.engines:
                tasks.create_task(self._watch(engine))

    async def settle(self) -> None:
        """Returns when no replacement is under way. Raises what one failed with."""
        while away := [engine.replacement for engine in self.engines if engine.replacement is not None]:
            await asyncio.gather(*map(asyncio.shield, away))

    async def close(self) -> None:
        """Gives up replacements that are under way."""
        for engine in self.engines:
            if engine.replacement is not None:
                engine.replacement.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await engine.replacement

    async def _watch(self, engine: EnginePeer) -> None:
        options = self._options
        while True:
            if engine.replacement is not None:
                await asyncio.shield(engine.replacement)  # who ends the watch does not end the replacement
            await asyncio.sleep(options.interval_s)
            if self._on_silent is not None:
                await self._examine(engine, engine.restarts)

    def _report(self, engine: EnginePeer) -> None:
        engine.replacement = asyncio.get_running_loop().create_task(self._replacement(engine))
        for request in engine.requests:
            request.cancel()

    async def _replacement(self, engine: EnginePeer) -> None:
        assert self._on_silent is not None
        engine.move(await self._on_silent(engine.number))
