"""SIGTERM and SIGHUP as a notice that the machine or the terminal will be taken away: what is done is saved in time. So
it is when the run fails at something that leaves it whole."""

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from recipe.system.errors import USER_ERROR_STATUS, drop_dead_output, unwind

SAVED_STATUS = 75
"""Exit status of a run that ended on a notice with everything saved: EX_TEMPFAIL of sysexits.h, try again later."""


STOPPED_STATUS = 76
"""Exit status of a run that ended, saved, because a flag of its own said when it is enough."""


class Stopped(SystemExit):
    """The run has done enough: it ends here, saved. Its text says why."""

    def __init__(self, why: str) -> None:
        super().__init__(STOPPED_STATUS)
        self.why = why


async def safe_point() -> None:
    """A place where a notice may end the run: all ranks hold the same step, and nothing is half done."""
    await asyncio.sleep(0)


@dataclass(frozen=True)
class OnFailure:
    """How work is saved that is whole although the block fails."""

    has_unsaved: Callable[[], bool]
    """Whether there is such work."""
    save: Callable[[], None]
    limit_s: float
    """Seconds that saving may take."""
    limit_flag: str
    """The flag that says so."""


@contextmanager
def saving_on_notice(save: Callable[[], None], grace_s: float, on_failure: OnFailure | None = None) -> Iterator[None]:
    """In the block, which must belong to an asyncio task, the first SIGTERM or SIGHUP lets the work go on to the next
    await, and then ends it by `save` and exit status SAVED_STATUS. The second one, and the end of `grace_s` seconds,
    unwind the program at once, with status 143. Stopped ends it by `save` too. Any other exception ends it as
    `on_failure` says, and stays what the block ends with, also if saving fails or takes too long."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    noticed = ending = late = False

    def heed(number: int, _: FrameType | None) -> None:
        nonlocal noticed
        if noticed:
            give_up(f"a second notice ({signal.Signals(number).name}) received")
        noticed = True
        if number == signal.SIGHUP:
            drop_dead_output()
        _say(f"{signal.Signals(number).name} received: saving what is done, for at most {grace_s:g} s")
        signal.setitimer(signal.ITIMER_REAL, grace_s)
        if not ending:  # else it is being saved already
            loop.call_soon_threadsafe(task.cancel)

    def run_out_of_time(*_: object) -> None:
        nonlocal late
        if not noticed:
            late = True
            raise SystemExit(USER_ERROR_STATUS)  # Ray, where it waits, swallows all but this and KeyboardInterrupt
        give_up(f"not saved in {grace_s:g} s (--sigterm-grace-s)")

    def give_up(why: str) -> None:
        unwind(signal.SIGTERM, f"{why}; the last checkpoint is as it was")

    before = [(number, signal.signal(number, heed)) for number in _notices()]
    before.append((signal.SIGALRM, signal.signal(signal.SIGALRM, run_out_of_time)))
    try:
        yield
    except asyncio.CancelledError:
        if not noticed:
            raise
        task.uncancel()
        save()
        _say(f"saved; go on with --load (exit status {SAVED_STATUS})")
        raise SystemExit(SAVED_STATUS) from None
    except Stopped as enough:
        ending = True
        save()
        _say(f"{enough.why}: what is done is saved; to go on, --load and another limit (exit status {STOPPED_STATUS})")
        raise
    except Exception:
        if on_failure is not None and on_failure.has_unsaved():
            ending = True
            _save_before_failing(on_failure, lambda: late)
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before:
            signal.signal(number, handler)


def _save_before_failing(how: OnFailure, is_late: Callable[[], bool]) -> None:
    """`is_late`: whether it ended because its time was over."""
    _say("the run fails: saving what is done")
    saved = False
    try:
        with _limited_to(how.limit_s):
            how.save()
            saved = True
    except Exception as error:
        _say_unsaved(str(error) or type(error).__name__)
    except SystemExit:
        if not is_late():
            raise
        if not saved:
            _say_unsaved(f"it takes more than {how.limit_s:g} s, {how.limit_flag}")
    if saved:
        _say("what is done is saved; once the cause is mended, go on with --load")


@contextmanager
def _limited_to(seconds: float) -> Iterator[None]:
    """SIGALRM after so long in the block, unless it comes for a notice already."""
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _say_unsaved(why: str) -> None:
    _say(f"what is done is not saved ({why}); the last checkpoint is as it was")


def _notices() -> list[signal.Signals]:
    """SIGHUP is none where it is ignored, as under nohup."""
    all_of_them = (signal.SIGTERM, signal.SIGHUP)
    return [number for number in all_of_them if signal.getsignal(number) is not signal.SIG_IGN]


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
