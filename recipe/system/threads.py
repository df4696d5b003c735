"""Work beside the event loop, and how many threads compute."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import ParamSpec, TypeVar

from recipe.system.errors import is_unwinding

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


async def to_its_end(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """The result of `work`, as of `in_thread`; but who is cancelled meanwhile waits for its end, and then is told what
    it failed with. Only a signal that unwinds the program does not wait."""
    task = asyncio.ensure_future(in_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not is_unwinding():
            await asyncio.wait({task})
            task.result()
        raise


def threads_each(processes: int, polling: int = 0) -> int:
    """Threads of each of the `processes` that compute at once on this machine, beside `polling` others for each of them
    that keep a core busy all the time. A thread that has to share its core makes all others of its process wait: CPU
    Adam takes twice as long (`scripts/bench_adam.py --polling 1`)."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // processes - polling)


@contextmanager
def signals_left_to_the_others() -> Iterator[None]:
    """Threads that are started in the block take no signals. One that did would undo what the main thread does when it
    blocks one for a while: Python runs its handler then all the same."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
