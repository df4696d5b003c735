"""asyncio under signals: whatever is under way is closed in order first."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_interruptible(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end. SIGINT and SIGTERM cancel it, and reach the program's own handlers when it has
    unwound: an exception that a handler raises would come up in whichever task is running at that moment."""
    received: list[signal.Signals] = []

    async def run() -> None:
        task = asyncio.ensure_future(coroutine)

        def cancel(number: signal.Signals) -> None:
            received.append(number)
            task.cancel()

        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, cancel, number)
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        asyncio.run(run())
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
