"""status.json: what a run is doing, written by a thread of its own every few seconds, for whoever watches it.

The file says how long the run has lived, over all of its commands, and so what it has cost: a command that was killed
counts up to its last beat. A file that cannot be written ends nothing.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

import psutil
from pydantic import TypeAdapter, ValidationError

from recipe.system.files import atomic_write_text
from recipe.system.json_text import parse_json
from recipe.system.threads import signals_left_to_the_others

BEAT_S = 3.0
PAUSE_S = 0.5
"""Between two writes, however much there is to tell."""
SILENT_S = 120.0
"""A run that has not beaten for so long has died, as far as another machine can tell by its own clock."""
JOIN_S = 10.0
"""Longest wait for the thread, which may hang in a file system that does."""
FILE = "status.json"


class RunState(StrEnum):
    """What a run is."""

    STARTING = "starting"
    RUNNING = "running"
    SAVING = "saving"
    FINISHED = "finished"
    """All rollouts are done."""
    INTERRUPTED = "interrupted"
    """It ended before, by a signal."""
    STOPPED = "stopped"
    """It ended before, saved, as a flag of its own asked for."""
    FAILED = "failed"
    """An error ended it."""
    DIED = "died"
    """It ended without a word."""


LIVING = (RunState.STARTING, RunState.RUNNING, RunState.SAVING)


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the file holds. Times are seconds since 1970."""

    state: RunState
    doing: str
    """The part of the start or the phase of the step that is under way; how the run ended."""
    since: float
    """When that began."""
    step: int
    """Finished rollouts."""
    total_steps: int
    began: float
    """This command of the run."""
    beat: float
    """When this was written."""
    seconds: float
    """Wall time of all commands of the run, up to this beat."""
    dollars: float
    """What they cost, each by its own GPUs and price."""
    gpus: int
    """GPUs that are paid for now; machines, where the run uses none."""
    price: float
    """Dollars of one of them an hour."""
    process: tuple[str, int, int]
    """The run's process: machine and namespace of process ids, id, and its start in ticks since the machine's."""

    @property
    def dollars_a_second(self) -> float:
        """What the run costs now."""
        return self.gpus * self.price / 3600

    def now(self) -> Self:
        """As it is to be shown: DIED where the run's process is gone or, on another machine, has been silent."""
        if self.state not in LIVING:
            return self
        is_here = self.process[0] == _place() != ""
        lives = is_alive(self.process) if is_here else time.time() - self.beat < SILENT_S
        return self if lives else replace(self, state=RunState.DIED)


def is_alive(process: tuple[str, int, int]) -> bool:
    """Whether a process of this machine is still there."""
    _, number, ticks = process
    try:
        return _start_ticks(number) == ticks and psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.Error):
        return False


def _start_ticks(number: int) -> int:
    """When a process began, in ticks since the machine did: no clock that somebody sets. Raises OSError if there is
    none of this number."""
    after_its_name = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2]
    return int(after_its_name.split()[19])


def _place() -> str:
    """Names this machine, since it was switched on, and this namespace of process ids; nothing where that is hidden."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def read_status(run: Path) -> Status | None:
    """What the file of a run said last; None where there is none that can be read."""
    with suppress(OSError, ValueError, ValidationError):
        return TypeAdapter(Status).validate_python(parse_json((run / FILE).read_bytes()))
    return None


class StatusWriter:
    """Keeps the file fresh until it is closed. Whatever is told is written soon, by the thread."""

    def __init__(self, run: Path, total_steps: int, gpus: int, price: float, least_s: float = 0.0) -> None:
        """`least_s` are the seconds that the run has certainly taken, where no file tells more."""
        began, before = psutil.Process().create_time(), read_status(run)
        self._path = run / FILE
        self._opened = time.monotonic()
        earlier = least_s if before is None else max(0.0, before.seconds)
        own = max(0.0, time.time() - began)
        rate = gpus * price / 3600
        self._status = Status(
            state=RunState.STARTING,
            doing="command",
            since=began,
            step=0 if before is None else before.step,
            total_steps=total_steps,
            began=began,
            beat=time.time(),
            seconds=earlier + own,
            dollars=(earlier * rate if before is None else before.dollars) + own * rate,
            gpus=gpus,
            price=price,
            process=_this_process(),
        )
        self._news, self._closed = threading.Event(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="status", daemon=True)
        with signals_left_to_the_others():
            self._thread.start()

    @property
    def status(self) -> Status:
        """As of now. Time is taken from a clock that nobody sets."""
        status, since = self._status, time.monotonic() - self._opened
        return replace(
            status,
            beat=time.time(),
            seconds=status.seconds + since,
            dollars=status.dollars + since * status.dollars_a_second,
        )

    def tell(self, state: RunState, doing: str) -> None:
        """The run is in this state, at this part of a start or phase of a step."""
        self._status = replace(self._status, state=state, doing=doing, since=time.time())
        self._news.set()

    def count(self, step: int) -> None:
        """So many rollouts are done."""
        self._status = replace(self._status, step=step)
        self._news.set()

    def close(self, state: RunState, how: str) -> None:
        """The run has ended. Returns when that is written, or cannot be."""
        self._closed.set()
        self._news.set()
        self._thread.join(JOIN_S)
        plain = how.encode(errors="backslashreplace").decode()  # a path may have bytes that are no text
        self._status = replace(self._status, state=state, doing=plain, since=time.time())
        self._write()

    def _beat(self) -> None:
        while not self._closed.is_set():
            self._news.wait(BEAT_S)
            self._news.clear()
            self._write()
            self._closed.wait(PAUSE_S)

    def _write(self) -> None:
        with suppress(OSError):
            atomic_write_text(self._path, _as_json(self.status))


def _this_process() -> tuple[str, int, int]:
    """What `Status.process` says of this one."""
    try:
        return _place(), os.getpid(), _start_ticks(os.getpid())
    except OSError:
        return "", os.getpid(), 0


def _as_json(status: Status) -> str:
    return TypeAdapter(Status).dump_json(status).decode() + "\n"
