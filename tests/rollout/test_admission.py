"""What is started and trained while the trainer works: in random orders, and in all orders at small sizes."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.rollout.admission import Admission


class Books:
    """An Admission, and what has become of every unit."""

    def __init__(self, size: int, max_staleness: int, rollouts: int) -> None:
        self.size, self.max_staleness, self.rollouts = size, max_staleness, rollouts
        self.admission = Admission(size, max_staleness, rollouts=rollouts)
        self.started: list[int] = []
        """The version under which each unit was started."""
        self.dropped: list[int] = []
        self.trained: list[int] = []

    def actions(self, *, drops: bool = True) -> list[tuple[str, int]]:
        """What may happen next."""
        one, trains = self.admission, self.admission.next_rollout > self.admission.version
        possible = [("start", 0)] if one.has_room() else []
        possible += [("pass", unit) for unit in one.under_way]
        possible += [("drop", unit) for unit in one.under_way if drops]
        possible += [("take", 0)] if not trains and one.batch() is not None else []
        return possible + ([("update", 0)] if trains else [])

    def do(self, action: str, unit: int) -> None:
        one = self.admission
        match action:
            case "start":
                one.start(len(self.started))
                self.started.append(one.version)
            case "pass" | "drop":
                one.finish(unit, passes=action == "pass")
                self.dropped += [unit] if action == "drop" else []
            case "take":
                self.trained += self.take()
            case "update":
                one.advance(one.next_rollout)

    def take(self) -> list[int]:
        rollout = self.admission.next_rollout
        units = self.admission.take()
        assert len(units) == self.size
        assert all(0 <= rollout - self.started[unit] <= self.max_staleness for unit in units)
        return units

    def check(self) -> None:
        one = self.admission
        everywhere = [*one.under_way, *one.ready, *self.dropped, *self.trained]
        assert sorted(everywhere) == list(range(len(self.started)))
        live = len(one.under_way) + len(one.ready)
        assert live <= (self.max_staleness + 1) * self.size
        assert live <= (self.rollouts - one.next_rollout) * self.size
        for unit in (*one.under_way, *one.ready):
            assert self.started[unit] + self.max_staleness >= one.next_rollout
        assert self.is_over or self.actions(drops=False), "nothing can go on"

    @property
    def is_over(self) -> bool:
        return self.admission.version == self.rollouts

    @property
    def state(self) -> object:
        """What tells two of them apart for what may happen: versions in place of numbers."""
        one = self.admission
        under_way = tuple(sorted(self.started[unit] for unit in one.under_way))
        return one.version, one.next_rollout, under_way, tuple(self.started[unit] for unit in one.ready)


@pytest.mark.parametrize(
    ("size", "max_staleness", "rollouts"), [(1, 0, 3), (2, 0, 3), (1, 1, 4), (2, 1, 4), (1, 2, 5), (2, 2, 4), (1, 3, 6)]
)
def test_in_all_orders_nothing_is_too_old_or_lost_and_it_ends(size: int, max_staleness: int, rollouts: int) -> None:
    seen: set[object] = set()
    todo = [Books(size, max_staleness, rollouts)]
    ends = 0
    while todo:
        books = todo.pop()
        books.check()
        ends += books.is_over
        for after in successors(books):
            if after.state not in seen:
                seen.add(after.state)
                todo.append(after)
    assert ends
    assert len(seen) > rollouts


def successors(books: Books) -> Iterator[Books]:
    for action, unit in books.actions():
        after = deepcopy(books)
        after.do(action, unit)
        yield after


@given(st.integers(1, 5), st.integers(0, 4), st.integers(1, 8), st.data())
def test_in_any_order_nothing_is_too_old_or_lost(
    size: int, max_staleness: int, rollouts: int, data: st.DataObject
) -> None:
    books = Books(size, max_staleness, rollouts)
    for _ in range(120):
        if books.is_over:
            break
        actions = books.actions()
        books.do(*actions[data.draw(st.integers(0, len(actions) - 1))])
        books.check()


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 6), st.data())
def test_what_a_checkpoint_holds_is_taken_over_within_the_bound_and_the_run_ends(
    size: int, max_staleness: int, rollouts: int, data: st.DataObject
) -> None:
    """Whatever bound the run that goes on has."""
    books = Books(size, max_staleness, rollouts)
    for _ in range(data.draw(st.integers(0, 60))):
        if books.is_over:
            break
        actions = books.actions()
        books.do(*actions[data.draw(st.integers(0, len(actions) - 1))])
    before, bound = books.admission, data.draw(st.integers(0, 4))
    done = before.version
    resumed = Admission(size, bound, rollouts=rollouts, done=done)
    taken_over = {}
    for unit in before.ready:
        if resumed.has_room(books.started[unit]):
            resumed.start(unit, taken_over.setdefault(unit, books.started[unit]))
            resumed.finish(unit, passes=True)
    if bound >= max_staleness and before.next_rollout == done:
        assert sorted(taken_over) == sorted(before.ready)
    fresh = len(books.started)
    while resumed.next_rollout < rollouts:
        while resumed.has_room():
            resumed.start(fresh)
            resumed.finish(fresh, passes=True)
            fresh += 1
        rollout = resumed.next_rollout
        assert all(rollout - taken_over.get(unit, rollout) <= bound for unit in resumed.take())
        resumed.advance(rollout + 1)


def test_one_rollout_at_a_time_where_nothing_may_be_stale() -> None:
    one = Admission(2, 0, rollouts=3)
    for unit in (0, 1):
        one.start(unit)
    assert not one.has_room()
    for unit in (1, 0):
        one.finish(unit, passes=True)
    assert one.take() == [1, 0]
    assert not one.has_room(), "while the trainer works"
    one.advance(1)
    assert one.has_room()


def test_a_rollout_waits_for_the_group_whose_last_one_it_is_and_not_for_others() -> None:
    one = Admission(1, 2, rollouts=9)
    for unit in (0, 1, 2):
        one.start(unit)
    one.finish(2, passes=True)
    assert one.take() == [2], "0 and 1 have rollouts 1 and 2"
    one.advance(1)
    one.start(3)
    one.finish(3, passes=True)
    assert one.batch() is None, "0 and 1 have both to go into rollouts 1 and 2"
    one.finish(1, passes=True)
    assert one.take() == [1]
