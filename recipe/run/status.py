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

from recipe.system.files import replace_text
from recipe.system.json_text import parse_json

BEAT_S = 3.0
SILENT_S = 60.0
"""A run that has not beaten for so long has died, as far as another machine can tell."""
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
    earlier_s: float = 0.0
    """Seconds of the run's earlier commands."""
    gpus: int
    """GPUs that are paid for; machines, where the run uses none."""
    price: float
    """Dollars of one of them an hour."""
    process: tuple[str, int, float]
    """The run's process: machine and namespace of process ids, id, and time of its start."""

    @property
    def seconds(self) -> float:
        """Wall time of all commands of the run, up to this beat."""
        return self.earlier_s + self.beat - self.began

    @property
    def dollars(self) -> float:
        """What that costs."""
        return self.seconds / 3600 * self.gpus * self.price

    def now(self) -> Self:
        """As it is to be shown: DIED where the run's process is gone, or has been silent for SILENT_S."""
        if self.state not in LIVING or (is_alive(self.process) and time.time() - self.beat < SILENT_S):
            return self
        return replace(self, state=RunState.DIED)


def is_alive(process: tuple[str, int, float]) -> bool:
    """False where the process was on this machine and is there no more; of other machines' nothing is known: True."""
    place, number, began = process
    if place != _place():
        return True
    try:
        found = psutil.Process(number)
        return abs(found.create_time() - began) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _place() -> str:
    """Names this machine, since it was switched on, and this namespace of process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def read_status(run: Path) -> Status | None:
    """What the file of a run said last; None where there is none that can be read."""
    with suppress(OSError, ValueError, ValidationError):
        return TypeAdapter(Status).validate_python(parse_json((run / FILE).read_bytes()))
    return None


class StatusWriter:
    """Keeps the file fresh until it is closed. Whatever is told is written soon, by the thread."""

    def __init__(self, run: Path, total_steps: int, gpus: int, price: float) -> None:
        process = psutil.Process()
        began = process.create_time()
        before = read_status(run)
        self._path = run / FILE
        self._status = Status(
            state=RunState.STARTING,
            doing="command",
            since=began,
            step=0 if before is None else before.step,
            total_steps=total_steps,
            began=began,
            beat=time.time(),
            earlier_s=0.0 if before is None else before.seconds,
            gpus=gpus,
            price=price,
            process=(_place(), process.pid, began),
        )
        self._news, self._closed = threading.Event(), threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="status", daemon=True)
        self._thread.start()

    @property
    def status(self) -> Status:
        """As of now."""
        return replace(self._status, beat=time.time())

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
        self._thread.join()
        self._status = replace(self._status, state=state, doing=how, since=time.time())
        self._write()

    def _beat(self) -> None:
        while not self._closed.is_set():
            self._news.wait(BEAT_S)
            self._news.clear()
            self._write()

    def _write(self) -> None:
        with suppress(OSError):
            replace_text(self._path, _as_json(self.status))


def _as_json(status: Status) -> str:
    return TypeAdapter(Status).dump_json(status).decode() + "\n"
