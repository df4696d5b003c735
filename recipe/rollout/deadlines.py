"""Longest waits for engines, whose time does not run while the engines stand still."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Deadlines:
    """All waits of a client, in one event loop."""

    def __init__(self) -> None:
        self._left: dict[asyncio.Timeout, float] = {}
        self._are_stopped = False

    @asynccontextmanager
    async def within(self, seconds: float | None) -> AsyncIterator[None]:
        """Raises TimeoutError if the block takes longer, without the time in which all were stopped; None: it may take
        for ever."""
        async with asyncio.timeout(None) as wait:
            if seconds is not None:
                self._left[wait] = seconds
                if not self._are_stopped:
                    wait.reschedule(_now() + seconds)
            try:
                yield
            finally:
                self._left.pop(wait, None)

    def stop(self) -> None:
        """Time does not run until `go_on`."""
        self._are_stopped = True
        for wait in self._left:
            if (when := wait.when()) is not None and not wait.expired():
                self._left[wait] = when - _now()
                wait.reschedule(None)

    def go_on(self) -> None:
        """Time runs again."""
        self._are_stopped = False
        for wait, left in self._left.items():
            if not wait.expired():
                wait.reschedule(_now() + left)


def _now() -> float:
    return asyncio.get_running_loop().time()
