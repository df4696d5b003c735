"""Scores of known verdicts."""

import pytest

from evaluation.grading import Judgement, Verdict
from evaluation.scoring import Judged, majority_answer, score


def judged(answer: str | None, *, right: bool = False, tokens: int = 10) -> Judged:
    """Of an integer that may be spelled with zeros."""
    if answer is None:
        return Judged(Judgement(Verdict.TRUNCATED, None, ""), tokens, truncated=True)
    value = answer.removesuffix(".0").lstrip("0")
    return Judged(Judgement(Verdict.CORRECT if right else Verdict.WRONG, answer, "", value), tokens, truncated=False)


def test_spellings_of_an_integer_vote_together_and_silence_does_not_vote() -> None:
    outvoted = [judged("25", right=True), judged("25.0", right=True), *map(judged, ("30", "030", "30.0")), judged(None)]
    assert majority_answer(outvoted, "025") == "30"
    found = score([outvoted], seed=1)
    assert found.maj_at[6].mean == 0
    assert found.maj_at[1].mean == pytest.approx(2 / 6)
    assert found.pass_at[6].mean == 1
    tied = [*outvoted, judged("025", right=True)]
    assert score([tied], seed=1).maj_at[7].mean == 0.5
    assert majority_answer([judged(None)] * 3, "25") is None
    split = [judged("25", right=True), judged("025", right=True), *map(judged, ("1", "2", "x"))]
    assert score([split], seed=1).maj_at[5].mean == 1
    assert majority_answer(split, "25") == "25"


def test_every_problem_counts_alike_and_lengths_are_of_all_samples() -> None:
    easy = [judged("1", right=True, tokens=length) for length in (1, 2, 3, 100)]
    hard = [judged("2", tokens=length) for length in (5, 6, 7)] + [judged(None, tokens=1000)]
    found = score([easy, hard], seed=1)
    assert found.avg_at_n.mean == 0.5
    assert (found.problems, found.samples) == (2, 8)
    assert found.truncated_share == 1 / 8
    assert (found.tokens.mean, found.tokens.p50, found.tokens.max) == (140.5, 5.5, 1000)
    assert 900 < found.tokens.p99 < 1000
    assert list(found.pass_at) == list(found.maj_at) == [1, 2, 4]


def test_what_could_not_be_graded_counts_as_not_correct_and_apart() -> None:
    failed = Judged(Judgement(Verdict.GRADER_FAILED, "9^{9^{9}}", "too long"), 10, truncated=False)
    found = score([[judged("1", right=True), failed]], seed=1)
    assert found.avg_at_n.mean == 0.5
    assert found.grader_failed_share == 0.5
    assert found.no_answer_share == found.truncated_share == 0
