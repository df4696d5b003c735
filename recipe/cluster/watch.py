"""Waiting for calls to all training ranks, and finding out who is to blame when they come to a standstill.

Ray lets a rank answer where it is while it works. It is asked now and then; that no rank gets anything done for most of
the time-out of torch.distributed, or that one of them gives up waiting, ends the waiting.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from recipe.cluster.calls import raise_failure
from recipe.cluster.hang_diagnosis import RankState, blame, flushes
from recipe.cluster.hang_report import RankSnapshot, all_stacks, sentence, short_stacks
from recipe.system.errors import UserError
from recipe.system.files import atomic_write_text
from recipe.system.heartbeat import RankLocation

PATIENCE = 0.8
"""Share of the time-out after which a standstill is looked into: before torch.distributed ends innocent ranks."""
LOOKS_PER_TIMEOUT = 20
ANSWER_TIMEOUT_S = 10.0
"""A rank that does not say in this time where it is does not answer."""
NEWS_OF_DEATH_S = 5.0
"""Time in which Ray learns that a process is gone, which its peers may notice first."""
_TORN = re.compile(r"gloo|NCCL|pair closure|Connection (closed|reset) by peer")


@dataclass(frozen=True)
class WatchedRank:
    """A training rank as the driver knows it."""

    name: str
    process: str
    actor: ActorHandle


@dataclass
class _View:
    """What is known of a rank during a call."""

    moved: float
    """When it was first seen where it still is, on the monotonic clock."""
    progressed: float
    """When it was first seen to have got as far as it has."""
    seen: RankLocation | None = None
    question: ray.ObjectRef | None = None
    """That it has not answered yet."""
    asked: float = 0.0
    error: str = ""
    """With which it gave up waiting for the others."""


class WatchedCall:
    """A call that all ranks carry out together."""

    def __init__(
        self, ranks: Sequence[WatchedRank], references: Sequence[ray.ObjectRef], timeout_s: float, report: Path
    ) -> None:
        self._ranks, self._references, self._timeout_s, self._report = ranks, references, timeout_s, report
        self._pending = {reference: rank for rank, reference in enumerate(references)}
        now = time.monotonic()
        self._views = [_View(now, now) for _ in ranks]
        self._interval = timeout_s / LOOKS_PER_TIMEOUT
        self._next_look = now + self._interval

    def results(self) -> list[Any]:
        """What the ranks return, failures as `calls.get` raises them. Raises UserError, which names who is to blame, if
        the ranks come to a standstill; what each of them was doing is written to the report."""
        while not self.advance():
            pass
        return ray.get(list(self._references))

    def advance(self, at_most_s: float = math.inf) -> bool:
        """Waits for news of the ranks, for `at_most_s` seconds. Returns whether all are done; raises as `results`."""
        if not self._pending:
            return True
        wait_s = min(at_most_s, max(0.0, self._next_look - time.monotonic()))
        done, _ = ray.wait(list(self._pending), timeout=wait_s)
        self._settle(done)
        if self._has_given_up:
            self._ask_everyone(at_least_s=NEWS_OF_DEATH_S)
            self._accuse()
        if time.monotonic() >= self._next_look:
            self._look()
            if self._stands_still:
                self._ask_everyone()
                if self._stands_still or self._has_given_up:
                    self._accuse()
            self._next_look = time.monotonic() + self._interval
        return not self._pending

    def _settle(self, done: Sequence[ray.ObjectRef]) -> None:
        """Takes note of calls that are over. A rank that lost the others does not end the waiting by itself: it is
        seldom to blame."""
        for reference in done:
            rank = self._pending.pop(reference)
            try:
                raise_failure(reference, self._ranks[rank].name)
            except RayTaskError as error:
                if not _lost_the_others(error.cause):
                    raise
                self._views[rank].error = (str(error.cause).strip() or type(error.cause).__name__).splitlines()[0]

    @property
    def _has_given_up(self) -> bool:
        return any(view.error for view in self._views)

    @property
    def _stands_still(self) -> bool:
        """Whether no rank gets anything done, and one of them not even moves: loading and compiling do. A rank whose
        data the kernel is bringing to the disk is at work."""
        limit = time.monotonic() - PATIENCE * self._timeout_s
        views = [self._views[rank] for rank in self._pending.values()]
        if any(view.seen is not None and flushes(view.seen.stack) for view in views):
            return False
        return all(view.progressed <= limit for view in views) and any(view.moved <= limit for view in views)

    def _look(self) -> None:
        """Takes in the answers that are there, and asks all ranks that have answered again."""
        self._take_answers()
        for rank, view in zip(self._ranks, self._views, strict=True):
            if view.question is None:
                view.question, view.asked = rank.actor.location.remote(), time.monotonic()

    def _take_answers(self) -> None:
        for rank, view in zip(self._ranks, self._views, strict=True):
            if view.question is None or not ray.wait([view.question], timeout=0)[0]:
                continue
            question, view.question = view.question, None
            try:
                self._note(view, ray.get(question))
            except ActorUnavailableError:
                continue
            except RayActorError:
                raise_failure(question, rank.name)

    @staticmethod
    def _note(view: _View, seen: RankLocation) -> None:
        now = time.monotonic()
        if view.seen is None or seen.beats != view.seen.beats:
            view.progressed = now
        if seen != view.seen:
            view.moved = now
        view.seen = seen

    def _ask_everyone(self, at_least_s: float = 0.0) -> None:
        """Asks all ranks, and waits until each has answered or its time for that is over. A death that Ray learns of
        meanwhile is raised."""
        self._look()
        soonest = time.monotonic() + at_least_s
        while (questions := self._open_questions(soonest)) or (self._pending and time.monotonic() < soonest):
            done, _ = ray.wait([*questions, *self._pending], timeout=0.2)
            self._settle([reference for reference in done if reference in self._pending])
            self._take_answers()

    def _open_questions(self, soonest: float) -> list[ray.ObjectRef]:
        now = time.monotonic()
        return [
            view.question
            for view in self._views
            if view.question is not None and now < max(soonest, view.asked + ANSWER_TIMEOUT_S)
        ]

    def _accuse(self) -> NoReturn:
        now, snapshots = time.monotonic(), {}
        for number, (rank, view) in enumerate(zip(self._ranks, self._views, strict=True)):
            state = RankState(
                view.seen if view.question is None else None,
                finished=not view.error and number not in self._pending.values(),
                gave_up=bool(view.error),
            )
            snapshots[number] = RankSnapshot(rank.process, state, view.seen, now - view.progressed, view.error)
        verdict = blame({number: snapshot.state for number, snapshot in snapshots.items()})
        accusation = sentence(verdict, snapshots)
        raise UserError(
            f"{accusation}; {self._write(accusation, snapshots)}mend what holds it up, or raise "
            f"--distributed-timeout-minutes (now {self._timeout_s / 60:g}) if it was only slow, and start again with "
            f"--load to go on from the last checkpoint\n{short_stacks(verdict, snapshots)}"
        )

    def _write(self, accusation: str, snapshots: Mapping[int, RankSnapshot]) -> str:
        """Writes the report, where that is possible. Returns where to find it."""
        try:
            atomic_write_text(self._report, f"{time.ctime()}: {accusation}\n\n{all_stacks(snapshots)}")
        except OSError:
            return ""
        return f"where every rank was stands in {self._report}; "


def _lost_the_others(error: BaseException) -> bool:
    """Whether this is how torch.distributed says that other ranks did not come, or went away."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and bool(_TORN.search(str(error))))
