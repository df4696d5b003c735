"""Work beside the event loop: its result and failure come back, and nobody who gives up has to wait for it."""

import asyncio
import subprocess
import sys
import threading

import pytest

from recipe.system.threads import in_thread, to_its_end

PROGRAM = """
import asyncio, time
from recipe.system.threads import in_thread

async def main():
    work = asyncio.create_task(in_thread(time.sleep, 600))
    await asyncio.sleep(0.1)
    work.cancel()

asyncio.run(main())
print("over")
"""


async def test_result_and_failure_come_back() -> None:
    assert await in_thread(int, "17", base=8) == 15
    assert await in_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ValueError, match="invalid literal"):
        await in_thread(int, "x")


async def test_who_is_cancelled_leaves_the_work_alone() -> None:
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        go.wait(240)
        done.set()

    waiting = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    assert done.wait(240)
    await asyncio.sleep(0.05)  # the result comes, and nobody minds


def test_a_program_ends_without_waiting_for_it() -> None:
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=900, check=True)
    assert (ended.stdout, ended.stderr) == ("over\n", "")


DEAF = """
import os, signal, threading, time
from recipe.system.threads import signals_left_to_the_others

came = []
signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
ended = threading.Event()
with signals_left_to_the_others():
    thread = threading.Thread(target=ended.wait, args=(60,))
    thread.start()
mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.2)
before = len(came)
signal.pthread_sigmask(signal.SIG_SETMASK, mask)
print(before, len(came))
ended.set()
"""


def test_a_thread_that_takes_no_signals_leaves_them_to_the_others() -> None:
    """Blocked by the main thread, a signal waits; such a thread does not take it either. In a program of its own: here
    other threads may."""
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=900, check=True)
    assert done.stdout == "0 1\n"


@pytest.mark.parametrize("fails", [False, True])
async def test_who_is_cancelled_meanwhile_waits_for_the_end_of_work_that_must_not_be_left_alone(fails: bool) -> None:
    begun, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        goes_on.wait(60)
        ended.set()
        if fails:
            raise ZeroDivisionError

    task = asyncio.create_task(to_its_end(work))
    await in_thread(begun.wait)
    task.cancel()
    await asyncio.sleep(0.02)
    assert not task.done()
    goes_on.set()
    with pytest.raises(ZeroDivisionError if fails else asyncio.CancelledError):
        await task
    assert ended.is_set()
