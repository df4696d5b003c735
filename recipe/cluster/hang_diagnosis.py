"""Which of the training ranks holds up the others, judged by where each of them is.

Ranks that wait stand in a collective operation of torch.distributed or, on GPUs, where the program asks for a result:
NCCL's operations return at once, and the CPU is held up later, at `.item()` or a synchronization.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from recipe.system.heartbeat import Frame, RankLocation

_WAITING_LINE = re.compile(r"\.(wait|synchronize|item|cpu|tolist|nonzero)\(")


class Reason(Enum):
    """Why ranks are blamed, the surest reason first."""

    SILENT = auto()
    """They do not answer."""
    ELSEWHERE = auto()
    """They do not wait, and others do or have nothing left to do."""
    APART = auto()
    """They are not where most are."""
    BEHIND = auto()
    """They got less done than most."""
    UNKNOWN = auto()
    """Nothing tells them apart."""


@dataclass(frozen=True)
class RankState:
    """A rank in a call that the others take part in."""

    seen: RankLocation | None
    """Where it is now, None if it does not answer."""
    finished: bool = False
    """It has carried out the call."""
    gave_up: bool = False
    """Its own wait for the others has ended, in an error."""


@dataclass(frozen=True)
class Verdict:
    """Who is to blame."""

    reason: Reason
    ranks: tuple[int, ...]


def blame(states: Mapping[int, RankState]) -> Verdict:
    """The ranks that hold up the others. Where it cannot be told, all that are in question."""
    at_work = {rank: state.seen for rank, state in states.items() if not (state.finished or state.gave_up)}
    if silent := [rank for rank, seen in at_work.items() if seen is None]:
        return Verdict(Reason.SILENT, tuple(silent))
    busy = {rank: seen for rank, seen in at_work.items() if seen is not None}
    if not busy:
        return Verdict(Reason.UNKNOWN, tuple(rank for rank, state in states.items() if state.gave_up))
    if len(busy) == 1 and not any(state.gave_up for state in states.values()):
        return Verdict(Reason.ELSEWHERE, tuple(busy))
    elsewhere = {rank: seen for rank, seen in busy.items() if not waits(seen.stack)}
    in_question = elsewhere or busy
    apart = _minority({rank: place(seen.stack) for rank, seen in in_question.items()})
    # Where more are elsewhere than wait, some of these wait too, in a call to a GPU that accepts no more.
    are_few = 2 * len(elsewhere) <= len(states)
    if elsewhere and len(elsewhere) < len(states) and (are_few or not apart):
        return Verdict(Reason.ELSEWHERE, tuple(elsewhere))
    if apart:
        return Verdict(Reason.APART, apart)
    beats = {rank: seen.beats for rank, seen in in_question.items()}
    if (behind := _minority(beats)) and {beats[rank] for rank in behind} == {min(beats.values())}:
        return Verdict(Reason.BEHIND, behind)
    return Verdict(Reason.UNKNOWN, tuple(rank for rank, state in states.items() if not state.finished))


def waits(stack: Sequence[Frame]) -> bool:
    """Whether a rank at `stack` waits for others, or for a GPU that may."""
    if not stack:
        return False
    inner = stack[_place(stack) :]
    return any(_is_collective(frame.file) for frame in inner) or any(
        _WAITING_LINE.search(frame.text) for frame in (inner[0], inner[-1])
    )


def flushes(stack: Sequence[Frame]) -> bool:
    """Whether a rank at `stack` waits for the disk."""
    return bool(stack) and "fsync(" in stack[-1].text


def place(stack: Sequence[Frame]) -> Frame | None:
    """The innermost line outside torch and Python's own library."""
    return stack[_place(stack)] if stack else None


def _place(stack: Sequence[Frame]) -> int:
    outside = [number for number, frame in enumerate(stack) if not _is_library(frame.file)]
    return max(outside, default=0)


def _is_library(file: str) -> bool:
    is_python = "/lib/python3" in file and "/site-packages/" not in file
    return is_python or file.startswith("<frozen") or "/site-packages/torch/" in file


def _is_collective(file: str) -> bool:
    return "/torch/distributed/" in file and "/torch/distributed/checkpoint/" not in file


def _minority(values: Mapping[int, Hashable]) -> tuple[int, ...]:
    """The ranks whose value is not that of more than half of them; none if no value is."""
    groups: dict[Hashable, Collection[int]] = defaultdict(list)
    for rank, value in values.items():
        groups[value] = [*groups[value], rank]
    most = max(groups.values(), key=len)
    return tuple(rank for rank in values if rank not in most) if 2 * len(most) > len(values) else ()
