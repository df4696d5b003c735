"""How far this process has come and where in the program it is: what a training rank answers when it is asked."""

import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple


class Frame(NamedTuple):
    """A line of a stack."""

    file: str
    line: int
    function: str
    text: str
    """The line's source."""


@dataclass(frozen=True)
class RankLocation:
    """Where a rank is at one moment."""

    beats: int
    stack: tuple[Frame, ...]
    """Outermost first; empty while it has nothing to do."""


class Heartbeat:
    """Counts what a process gets done. One thread works and beats, any other may ask."""

    def __init__(self) -> None:
        self.beats = 0
        self._worker: int | None = None

    def follow_this_thread(self) -> None:
        """From now on `location` speaks of the thread that calls this."""
        self._worker = threading.get_ident()

    @contextmanager
    def following(self, thread: int | None) -> Iterator[None]:
        """Meanwhile the followed thread waits for another, of which `location` speaks."""
        waiting, self._worker = self._worker, thread
        try:
            yield
        finally:
            self._worker = waiting

    def beat(self) -> None:
        """Something is done: a microbatch, a tensor of many. Only the followed thread's beats count."""
        if threading.get_ident() == self._worker:
            self.beats += 1

    def location(self) -> RankLocation:
        """How far the followed thread has come, and its stack. Where it waits for a GPU's backward pass, the stack goes
        on in autograd's own thread."""
        frames = sys._current_frames()
        own = frames.get(self._worker) if self._worker is not None else None
        if own is None:
            return RankLocation(self.beats, ())
        stack = _read(own)
        if stack[-1].file.endswith("torch/autograd/graph.py"):
            started_by_python = {
                thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)
            }
            others = frames.keys() - started_by_python - {self._worker, threading.get_ident()}
            stack += [line for other in sorted(others) for line in _read(frames[other])]
        return RankLocation(self.beats, tuple(stack))


def _read(frame: FrameType) -> list[Frame]:
    return [
        Frame(line.filename, line.lineno or 0, line.name, line.line or "") for line in traceback.extract_stack(frame)
    ]


heartbeat = Heartbeat()
"""This process's heartbeat."""
