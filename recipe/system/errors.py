"""Mistakes a user can mend are told in one sentence and end the program with a non-zero status."""

import errno
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

USER_ERROR_STATUS = 2
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_STDOUT, _STDERR = 1, 2


_LONGEST_QUOTE = 80
_ENDLESS_WORD = re.compile(r"\S{300,}")


def shortened(value: object) -> str:
    """A value as it is quoted in a sentence: no longer than a line."""
    quoted = repr(value)
    return quoted if len(quoted) <= _LONGEST_QUOTE else f"{quoted[: _LONGEST_QUOTE - 4]}...{quoted[-1]}"


class UserError(Exception):
    """One clear sentence for the user: what is wrong, where, and what to do. What it quotes is cut where it is longer
    than any word or path."""

    def __str__(self) -> str:
        return _ENDLESS_WORD.sub(lambda word: f"{word[0][:_LONGEST_QUOTE]}...", super().__str__())


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and exits with its status.

    A UserError is printed without a traceback, and so are a full disk and a file name that is too long. SIGINT, SIGTERM
    and SIGHUP unwind the program from wherever it is, so that what it started is ended, and give the status that shells
    expect of them; so does a reader of the output who leaves (`| head`).
    """
    signal.signal(signal.SIGINT, _unwind)
    signal.signal(signal.SIGTERM, _unwind)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _unwind)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # Ray's workers hand blocked ones down
    try:
        status = main() or 0
        print(end="", flush=True)
        sys.exit(status)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR_STATUS)
    except BrokenPipeError:
        if not _reader_has_left(_STDOUT):
            raise
        _drop(_STDOUT)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            told = UserError(f"{error.filename} is too long a name: a file system takes 255 bytes between two slashes")
            print(f"error: {told}", file=sys.stderr)
            sys.exit(USER_ERROR_STATUS)
        if error.errno not in DISK_IS_FULL:
            raise
        where = error.filename or "where the output goes"
        print(f"error: the disk is full: {where} could not be written; free space there", file=sys.stderr)
        _drop(_STDOUT)
        sys.exit(USER_ERROR_STATUS)
    except SystemExit:
        if _unwound_by:  # Ray, where it waits, makes a SystemExit of status 1 out of any other
            sys.exit(128 + _unwound_by[0])
        raise


def drop_dead_output() -> None:
    """From a handler of SIGHUP: what is still written to a terminal that is closed goes nowhere, and fails nothing."""
    for descriptor in (_STDOUT, _STDERR):
        if _reader_has_left(descriptor):
            _drop(descriptor)


def _drop(descriptor: int) -> None:
    """What is written to standard output, or to standard error, on the way out goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _reader_has_left(descriptor: int) -> bool:
    """Whether it is a pipe that nobody reads any more, or a terminal that is closed."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


_unwound_by: list[signal.Signals] = []


def unwind(number: signal.Signals, why: str) -> NoReturn:
    """From a signal's handler: ends the program in order, from wherever it is, as `run_main` says."""
    print(f"stopping: {why}", file=sys.stderr, flush=True)
    _unwound_by[:] = [number]
    logging.getLogger("asyncio").addFilter(_is_news)
    raise SystemExit(128 + number)


def is_unwinding() -> bool:
    """Whether a signal is ending the program."""
    return bool(_unwound_by)


def _unwind(number: int, _: FrameType | None) -> None:
    received = signal.Signals(number)
    if received is signal.SIGHUP:
        drop_dead_output()
    unwind(received, f"{received.name} received")


def _is_news(record: logging.LogRecord) -> bool:
    """False of what asyncio says of a task that the signal found at work and ended."""
    return not (record.exc_info and isinstance(record.exc_info[1], SystemExit))
