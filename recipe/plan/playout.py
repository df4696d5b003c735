"""A rollout played through: who waits, who runs, and how long the last ones are alone.

All sequences of an engine that run go on by a token at a time, so who runs when is decided on a clock that counts
tokens; how long each of its spans takes is asked afterwards. G: groups of GPUs of an engine that hold different
sequences; N: sequences of a group; E: moments at which somebody begins or ends.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TokenTime = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""[E] seconds by which every running sequence gets a token, by [E] sequences of the fullest group, [E] of all groups,
and [E] tokens before a sequence of the fullest group, on the mean."""
TAIL_SHARE = 0.25


@dataclass(frozen=True)
class Turn:
    """When the sequences of one group run, on the clock of tokens: [N] each, in the order in which they came."""

    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, lengths: np.ndarray, slots: int, come: np.ndarray | None = None) -> "Turn":
        """As many at once as there are slots; the next begins when one ends, and not before it has come: [N] moments,
        which never fall; all at 0 by default."""
        free = [0] * slots
        starts = np.zeros(len(lengths), dtype=np.int64)
        for number, length in enumerate(lengths):
            starts[number] = max(heapq.heappop(free), 0 if come is None else come[number])
            heapq.heappush(free, int(starts[number] + length))
        return cls(starts, starts + np.asarray(lengths, dtype=np.int64))

    def until(self, moment: int) -> "Turn":
        """The same, ended there for those that still run; who has not begun is left out."""
        begun = self.starts < moment
        return Turn(self.starts[begun], np.minimum(self.ends[begun], moment))

    def running(self, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[E] sequences that run just after each moment, and [E] the sum of the tokens that they have then."""
        begun, ended = np.sort(self.starts), np.argsort(self.ends, kind="stable")
        count_begun = np.searchsorted(begun, moments, side="right")
        count_ended = np.searchsorted(self.ends[ended], moments, side="right")
        sum_begun = np.concatenate([[0], np.cumsum(begun)])[count_begun]
        sum_ended = np.concatenate([[0], np.cumsum(self.starts[ended])])[count_ended]
        count = count_begun - count_ended
        return count, count * moments - (sum_begun - sum_ended)


@dataclass(frozen=True)
class Played:
    """What became of a rollout on one engine."""

    seconds: float
    tail_s: float
    """Of them with less than a quarter of the most sequences at once."""


@dataclass(frozen=True)
class Stretch:
    """A part of an engine's course."""

    played: Played
    made: int
    """Tokens that are made in it."""
    held: float
    """Tokens of all that run, prompts included, on the mean over its time."""


@dataclass(frozen=True)
class Course:
    """How an engine's work goes on: what it has made on the clock of tokens, and on that of seconds."""

    moments: np.ndarray
    """[E + 1] on the clock of tokens, rising; the last one is the end."""
    seconds: np.ndarray
    """[E] of the span that begins at each; none while nothing runs, for then no token is made."""
    running: np.ndarray
    """[E] sequences in that span."""
    held: np.ndarray
    """[E] tokens of all of them, prompts included, on the mean of the span."""

    @classmethod
    def of(cls, turns: Sequence[Turn], prompt: float, token_time: TokenTime) -> "Course":
        """The groups of one engine, which make their tokens together; each sequence has a `prompt` before it."""
        moments = np.unique(np.concatenate([edge for turn in turns for edge in (turn.starts, turn.ends)]))
        if len(moments) < 2:
            return cls(moments, np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0))
        spans, begins = np.diff(moments), moments[:-1]
        found = [turn.running(begins) for turn in turns]
        counts_GE = np.stack([count for count, _ in found])
        tokens_GE = np.stack([tokens for _, tokens in found])
        fullest = counts_GE.argmax(axis=0), np.arange(len(begins))
        batch = counts_GE[fullest]
        context = prompt + tokens_GE[fullest] / np.maximum(1, batch) + spans / 2
        total = counts_GE.sum(axis=0)
        seconds = np.where(total > 0, spans * token_time(batch, total, context), 0.0)
        return cls(moments, seconds, total, tokens_GE.sum(axis=0) + total * (prompt + spans / 2))

    def at(self, moments: np.ndarray) -> np.ndarray:
        """Seconds from the first of the course's moments to each of these."""
        return np.interp(moments, self.moments, np.concatenate([[0.0], np.cumsum(self.seconds)]))

    def between(self, first: int, last: int) -> Stretch:
        """What lies between two moments."""
        spans = np.clip(self.moments[1:], first, last) - np.clip(self.moments[:-1], first, last)
        seconds = self.seconds * spans / np.diff(self.moments)
        few = self.running < TAIL_SHARE * self.running[spans > 0].max(initial=0)
        return Stretch(
            Played(float(seconds.sum()), float(seconds[few].sum())),
            made=int((spans * self.running).sum()),
            held=float((seconds * self.held).sum() / max(seconds.sum(), 1e-9)),
        )


def play(turns: Sequence[Turn], prompt: float, token_time: TokenTime) -> Played:
    """A rollout on one engine, from its first token to its last."""
    course = Course.of(turns, prompt, token_time)
    return course.between(course.moments[0], course.moments[-1]).played if len(course.moments) else Played(0.0, 0.0)


def in_order(turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of an engine's sequences in the order in which they came, before its groups got them in turn."""
    starts, ends = (np.zeros(sum(len(turn.ends) for turn in turns), dtype=np.int64) for _ in range(2))
    for place, turn in enumerate(turns):
        starts[place :: len(turns)], ends[place :: len(turns)] = turn.starts, turn.ends
    return starts, ends
