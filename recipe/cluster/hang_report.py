"""A hang in words: a sentence that names who is to blame, and every rank's stack."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from recipe.cluster.hang_diagnosis import RankState, Reason, Verdict, place
from recipe.system.heartbeat import Frame, RankLocation

SHORT_STACK = 8
"""Innermost lines of a stack that are shown where all would be too many."""


@dataclass(frozen=True)
class RankSnapshot:
    """What the driver knows of a rank."""

    process: str
    """Its process and machine."""
    state: RankState
    last_seen: RankLocation | None
    """Where it was when it last answered."""
    still_s: float
    """Seconds in which it got nothing done."""
    error: str = ""
    """What a rank said that gave up waiting."""


def sentence(verdict: Verdict, snapshots: Mapping[int, RankSnapshot]) -> str:
    """Who is to blame and why."""
    blamed = {rank: snapshots[rank] for rank in verdict.ranks}
    others = {rank: snapshot for rank, snapshot in snapshots.items() if rank not in blamed}
    seconds = f"{min((snapshot.still_s for snapshot in blamed.values()), default=0):.0f} s"
    names = _names(blamed)
    match verdict.reason:
        case Reason.SILENT:
            text = (
                f"{names} {_verb(blamed, 'does', 'do')} not answer: the process is stopped, or stuck in native code "
                "that holds Python's lock, or its machine is lost"
            )
            if seen := {rank: snapshot for rank, snapshot in blamed.items() if snapshot.last_seen is not None}:
                text += f"; last seen {_places(seen)}"
        case Reason.ELSEWHERE:
            text = f"{names} got nothing done for {seconds}, {_places(blamed)}{_waiting(others)}"
        case Reason.APART:
            text = f"the training ranks got nothing done for {seconds}, most likely because of {names}, "
            text += f"{_places(blamed)} while the others are {_places(others)}"
        case Reason.BEHIND:
            text = f"the training ranks got nothing done for {seconds}, most likely because of {names}, "
            text += f"behind the others, {_places(blamed)}"
        case Reason.UNKNOWN:
            text = f"{names} got nothing done for {seconds}, and which is to blame cannot be told: {_places(blamed)}"
    return text + "".join(
        f"; training rank {rank} gave up: {snapshot.error}" for rank, snapshot in snapshots.items() if snapshot.error
    )


def short_stacks(verdict: Verdict, snapshots: Mapping[int, RankSnapshot]) -> str:
    """The ends of the blamed ranks' stacks."""
    return "\n".join(_stack(rank, snapshots[rank], SHORT_STACK) for rank in verdict.ranks)


def all_stacks(snapshots: Mapping[int, RankSnapshot]) -> str:
    """The whole stacks of all ranks."""
    return "\n".join(_stack(rank, snapshot) for rank, snapshot in snapshots.items())


def _names(snapshots: Mapping[int, RankSnapshot]) -> str:
    return _listed(f"training rank {rank} ({snapshot.process})" for rank, snapshot in snapshots.items())


def _places(snapshots: Mapping[int, RankSnapshot]) -> str:
    """Where these ranks are, told once for each place."""
    at = {rank: _place(snapshot.last_seen) for rank, snapshot in snapshots.items()}
    found = list(dict.fromkeys(at.values()))
    if len(found) == 1:
        return found[0]
    return _listed(
        f"{_verb(ranks, 'rank', 'ranks')} {_listed(map(str, ranks))} {where}"
        for where in found
        if (ranks := [rank for rank in at if at[rank] == where])
    )


def _place(seen: RankLocation | None) -> str:
    if seen is None or (line := place(seen.stack)) is None:
        return "outside its program"
    return f"in {_file(line)} line {line.line} ({line.function})"


def _waiting(snapshots: Mapping[int, RankSnapshot]) -> str:
    """What these do meanwhile: where most of them wait."""
    if not snapshots:
        return ""
    waiting = [_place(snapshot.last_seen) for snapshot in snapshots.values() if not snapshot.state.finished]
    if not waiting:
        return "; the others are done"
    [(where, _)] = Counter(waiting).most_common(1)
    return f"; the others wait for it {where}"


def _stack(rank: int, snapshot: RankSnapshot, lines: int | None = None) -> str:
    state, stack = snapshot.state, snapshot.last_seen.stack if snapshot.last_seen is not None else ()
    notes = [
        f"beat {snapshot.last_seen.beats}" if snapshot.last_seen is not None else "never seen",
        *["finished"] * state.finished,
        *[f"gave up: {snapshot.error}"] * state.gave_up,
        *["does not answer, last seen here"] * (state.seen is None),
    ]
    shown = stack[-lines:] if lines is not None else stack
    return "\n".join([f"training rank {rank} ({snapshot.process}; {', '.join(notes)}):", *map(_line, shown), ""])


def _line(frame: Frame) -> str:
    return f'  File "{frame.file}", line {frame.line}, in {frame.function}\n    {frame.text}'


def _file(frame: Frame) -> str:
    """The file as Python imports it."""
    for root in ("/site-packages/", "/recipe/"):
        _, found, rest = frame.file.rpartition(root)
        if found:
            return rest if root == "/site-packages/" else f"recipe/{rest}"
    return frame.file


def _verb(many: Mapping | Sequence, one: str, several: str) -> str:
    return one if len(many) == 1 else several


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
