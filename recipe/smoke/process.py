"""A step of the smoke run: a command in a process of its own, whose output is shown, and what becomes of it."""

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

from recipe.system.errors import UserError

POLL_S = 0.1
TAIL_LINES = 30
STOP_GRACE_S = 30.0
"""For a command that is to end because the smoke run does."""
LAST_OUTPUT_S = 5.0
"""For what a command has started and left behind, if anything, to let go of its output."""
OVERDUE_S = 1200.0
"""For a command to end by itself: four times what the slowest takes."""

Watch = Callable[[subprocess.Popen[str]], None]
"""Called now and then while a command runs."""


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    status: int
    """Negative: minus the signal that ended it."""
    seconds: float
    last_words: str
    """Its error, or the last line that it printed."""


def carry_out(title: str, command: Sequence[str], watch: Watch, log: Path) -> Ended:
    """Runs the command to its end, and ends it where this process is ended. Its output goes to `log`, too. Raises
    UserError if it is overdue."""
    print(f"== {title}", flush=True)
    began = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        process_group=0,  # Ctrl-C reaches it through `_end`, once
    )
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    reader = Thread(target=_pass_on, args=(process.stdout, log, tail), daemon=True)
    reader.start()
    try:
        while process.poll() is None:
            watch(process)
            if time.monotonic() - began > OVERDUE_S:
                raise UserError(f"{title} has not ended in {OVERDUE_S:.0f} s: see {log}")
            time.sleep(POLL_S)
    finally:
        _end(process)
        reader.join(LAST_OUTPUT_S)
    return Ended(process.returncode, time.monotonic() - began, _last_words(tail))


def _pass_on(output: IO[str], log: Path, tail: deque[str]) -> None:
    with output, log.open("a", buffering=1) as file:
        for line in output:
            print("  ", line, end="", flush=True)
            file.write(line)
            tail.append(line.strip())


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a command that goes on: Ctrl-C, and after a while no mercy."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_words(tail: deque[str]) -> str:
    errors = [line for line in tail if line.startswith("error:")]
    spoken = errors or [line for line in tail if line]
    return spoken[-1].removeprefix("error: ") if spoken else ""
