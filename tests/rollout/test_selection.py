"""Which groups a rollout keeps, whatever the order in which they finish."""

from hypothesis import given
from hypothesis import strategies as st

from recipe.rollout.selection import Selection


def run(verdicts: list[bool], target: int, wave: int, order: st.DataObject, *, in_order: bool) -> tuple[Selection, int]:
    """Lets the groups of each wave finish in any order. Returns the selection and how many groups were submitted."""
    selection = Selection(target, in_order=in_order)
    under_way: list[int] = []
    submitted = 0
    while not selection.is_complete:
        while selection.needs_more:
            for _ in range(wave):
                selection.submit()
            under_way += range(submitted, submitted + wave)
            submitted += wave
        number = under_way.pop(order.draw(st.integers(0, len(under_way) - 1)))
        selection.decide(number, verdicts[number % len(verdicts)])
    return selection, submitted


CASES = (st.lists(st.booleans(), min_size=1, max_size=8).filter(any), st.integers(1, 6), st.integers(0, 5), st.data())


@given(*CASES)
def test_in_order_nothing_depends_on_who_finishes_first(
    verdicts: list[bool], target: int, more: int, data: st.DataObject
) -> None:
    selection, submitted = run(verdicts, target, target + more, data, in_order=True)
    passing = [number for number in range(submitted) if verdicts[number % len(verdicts)]]
    assert selection.kept == passing[:target]
    last = selection.kept[-1]
    assert selection.dropped == [number for number in range(last) if number not in passing]
    assert selection.unused == list(range(last + 1, submitted))


@given(*CASES, st.booleans())
def test_refills_are_the_fewest_and_every_group_has_one_fate(
    verdicts: list[bool], target: int, more: int, data: st.DataObject, in_order: bool
) -> None:
    wave = target + more
    selection, submitted = run(verdicts, target, wave, data, in_order=in_order)
    assert sum(verdicts[number % len(verdicts)] for number in range(submitted - wave)) < target
    assert len(selection.kept) == target
    assert all(verdicts[number % len(verdicts)] for number in selection.kept)
    assert not any(verdicts[number % len(verdicts)] for number in selection.dropped)
    assert sorted(selection.kept + selection.dropped + selection.unused) == list(range(submitted))


def test_otherwise_the_first_to_finish_are_kept() -> None:
    selection = Selection(2, in_order=False)
    for _ in range(4):
        selection.submit()
    for number, passes in ((3, True), (1, False), (2, True)):
        assert not selection.is_complete
        selection.decide(number, passes)
    assert selection.is_complete
    assert (selection.kept, selection.dropped, selection.unused) == ([2, 3], [1], [0])
