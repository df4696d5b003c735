"""Under what conditions a step was made: how many sequences were under way."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipe.run.conditions import POINTS, Conditions, Course, mean_share, thinned

COURSES = st.lists(st.tuples(st.floats(0, 1000), st.integers(0, 5000)), min_size=1, max_size=800).map(
    lambda points: tuple(sorted(points, key=lambda point: point[0]))
)


@given(COURSES)
def test_a_thinned_course_is_some_of_its_points_and_both_ends(course: tuple[tuple[float, int], ...]) -> None:
    found = thinned(course)
    assert len(found) <= POINTS + 1
    assert set(found) <= set(course)
    assert [found[0], found[-1]] == [course[0], course[-1]]
    assert [seconds for seconds, _ in found] == sorted(seconds for seconds, _ in found)


def test_a_tail_is_not_thinned_away_by_a_crowded_start() -> None:
    """Thousands of requests begin at once; a few go on for long."""
    start = [(number / 1e6, number) for number in range(4096)]
    tail = [(10.0 * number, 4096 - 40 * number) for number in range(1, 100)]
    assert len([point for point in thinned((*start, *tail)) if point in tail]) > 90


def test_the_share_of_a_rollout_whose_half_is_done_at_half_time() -> None:
    assert mean_share([(0.0, 8), (5.0, 4), (10.0, 0)]) == pytest.approx(0.75)
    assert mean_share([(0.0, 0)]) is None
    assert mean_share([]) is None


def test_a_course_is_what_was_told_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = itertools.count(100)
    monkeypatch.setattr("recipe.run.conditions.time.monotonic", lambda: float(next(moments)))
    course = Course()
    course.change(2)  # an evaluation's
    course.change(-2)
    course.begin()
    for change in (3, -1, -2):
        course.change(change)
    assert course.points() == ((0.0, 0), (1.0, 3), (2.0, 2), (3.0, 0), (4.0, 0))


def test_a_line_is_read_again_but_for_the_course() -> None:
    made = Conditions.here(3, [(0.0, 8), (5.0, 4), (10.0, 0)])
    line = made.as_line()
    again = Conditions.from_line(line)
    assert (again.step, again.busy_share, again.host_memory) == (3, 0.75, made.host_memory)
    assert line["running"] == [8, 4, 0]
    assert 0 < made.host_memory_used < made.host_memory
