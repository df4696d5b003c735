"""Natural endings of responses are read, and none of them for another answer."""

from collections import Counter
from collections.abc import Callable

from endings import KINDS, SENTENCES, Ending, endings

from recipe.rewards import REWARD_RULES, Grader, GradeRequest, RewardType

COUNT = 2000


def rewards(cases: list[Ending], label: Callable[[Ending], str]) -> list[float]:
    found: dict[int, float] = {}
    for kind in RewardType:
        chosen = [place for place, case in enumerate(cases) if case.rule is kind]
        with Grader(REWARD_RULES[kind]) as grader:
            grades = grader.grade([GradeRequest("", cases[at].response, label(cases[at])) for at in chosen])
        found |= {at: grade.reward for at, grade in zip(chosen, grades, strict=True)}
    return [found[at] for at in range(len(cases))]


def test_natural_endings_are_right_where_they_are_and_nowhere_else() -> None:
    cases = endings(COUNT)
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.language for case in cases} == set(SENTENCES)
    right = rewards(cases, lambda case: case.label)
    missed = [case for case, reward in zip(cases, right, strict=True) if reward != 1]
    assert len(missed) < COUNT / 100, (Counter(case.kind for case in missed), missed[:20])
    wrong = rewards(cases, lambda case: case.other)
    assert [case for case, reward in zip(cases, wrong, strict=True) if reward == 1] == []
