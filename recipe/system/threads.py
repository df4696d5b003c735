"""Work beside the event loop, and how many threads compute."""

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """The result of `work`, carried out in a thread of its own. Who is cancelled meanwhile leaves it alone, and the
    program ends without waiting for it, as it would for asyncio's own threads."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def tell(report: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody asks any more
            loop.call_soon_threadsafe(lambda: None if outcome.done() else report())

    def run() -> None:
        try:
            result = work(*arguments, **named)
        except BaseException as error:
            failure = error
            tell(lambda: outcome.set_exception(failure))
        else:
            tell(lambda: outcome.set_result(result))

    threading.Thread(target=run, name=getattr(work, "__name__", "work"), daemon=True).start()
    return await outcome


def threads_each(processes: int, polling: int = 0) -> int:
    """Threads of each of the `processes` that compute at once on this machine, beside `polling` others for each of them
    that keep a core busy all the time. A thread that has to share its core makes all others of its process wait: CPU
    Adam takes twice as long (`scripts/bench_adam.py --polling 1`)."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // processes - polling)
