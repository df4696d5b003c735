"""conditions.jsonl: under what conditions each step was made, a line a step. Times and memory differ from run to run of
one seed, so they are no metrics."""

import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import psutil

FILE = "conditions.jsonl"
POINTS = 120
"""At most so many are kept of a rollout's course."""


class Course:
    """How many sequences are under way while a rollout goes on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._running, self._idle_s, self._idle_since = 0, 0.0, self._began
        self._points: list[tuple[float, int]] = []

    def begin(self) -> None:
        """A rollout begins."""
        self._began, self._points = time.monotonic(), [(0.0, self._running)]

    def change(self, by: int) -> None:
        """So many more are under way."""
        now = time.monotonic()
        if not self._running:
            self._idle_s += now - self._idle_since
        self._running += by
        if not self._running:
            self._idle_since = now
        self._points.append((now - self._began, self._running))

    @property
    def idle_s(self) -> float:
        """Seconds in which none was under way, since it was made."""
        return self._idle_s + (0.0 if self._running else time.monotonic() - self._idle_since)

    def points(self) -> tuple[tuple[float, int], ...]:
        """(seconds since it began, sequences from then on), the end among them."""
        return (*self._points, (time.monotonic() - self._began, self._running))


@dataclass(frozen=True)
class Conditions:
    """A line of the file."""

    step: int
    host_memory_used: int
    """Bytes of the first machine that are in use by anything, at the end of the step."""
    host_memory: int
    """Bytes that it has."""
    course: Sequence[tuple[float, int]] = ()
    """Of the step's rollout, as `Course.points` tells it."""
    busy_share: float | None = None
    """`mean_share` of the course."""

    @classmethod
    def here(cls, step: int, course: Sequence[tuple[float, int]]) -> Self:
        """Those of this machine now."""
        memory = psutil.virtual_memory()
        return cls(step, memory.total - memory.available, memory.total, thinned(course), mean_share(course))

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Self:
        """Those of a line, without the course."""
        return cls(line["step"], line["host_memory_used"], line["host_memory"], (), line["busy_share"])

    def as_line(self) -> dict[str, Any]:
        """The line."""
        return {
            "step": self.step,
            "host_memory_used": self.host_memory_used,
            "host_memory": self.host_memory,
            "busy_share": self.busy_share,
            "seconds": [round(seconds, 3) for seconds, _ in self.course],
            "running": [running for _, running in self.course],
        }


def thinned(course: Sequence[tuple[float, int]]) -> Sequence[tuple[float, int]]:
    """A course by POINTS of its points, as evenly spread over its time as may be; first and last are kept."""
    if len(course) <= POINTS:
        return course
    moments = [seconds for seconds, _ in course]
    wanted = (number * moments[-1] / (POINTS - 1) for number in range(POINTS - 1))
    places = sorted({bisect_right(moments, moment) - 1 for moment in wanted} | {0, len(course) - 1})
    return [course[place] for place in places]


def mean_share(course: Sequence[tuple[float, int]]) -> float | None:
    """Mean of the sequences under way over their most, by time: what of the engines' room a rollout used. None where
    there was no rollout."""
    most = max((running for _, running in course), default=0)
    if not most or not course[-1][0]:
        return None
    spans = [(after - before) * running for (before, running), (after, _) in pairwise(course)]
    return sum(spans) / (most * course[-1][0])
