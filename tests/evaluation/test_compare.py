"""Comparing two results."""

import json
from pathlib import Path

import pytest
from evaluation_support import N_SAMPLES, KnownServer, evaluate, write_questions

from evaluation.compare import compare, describe, main
from evaluation.grading import Verdict
from evaluation.result import Result
from recipe.run.statistics import paired_difference
from recipe.system.errors import UserError


@pytest.fixture
def pair(server: KnownServer, data: Path, tmp_path: Path) -> tuple[Result, Result]:
    words = ("--url", server.url, "--data", data)
    return evaluate(*words, "--save", tmp_path / "a"), evaluate(*words, "--save", tmp_path / "b", "--seed", 5)


def with_settings(result: Result, **changed: object) -> Result:
    sampling = result.settings.sampling.model_copy(update=changed)
    return result.model_copy(update={"settings": result.settings.model_copy(update={"sampling": sampling})})


def test_problems_are_paired_by_name_not_by_place(pair: tuple[Result, Result]) -> None:
    a, b = pair
    found = compare(a, b)
    shares = [[problem.correct_share for problem in result.problems] for result in pair]
    assert shares[0] != shares[1]
    assert found.difference == paired_difference(*shares, (N_SAMPLES, N_SAMPLES), seed=1234)
    assert found.difference.estimate.mean == pytest.approx(a.score.avg_at_n.mean - b.score.avg_at_n.mean)
    shuffled = b.model_copy(update={"problems": b.problems[::-1]})
    assert compare(a, shuffled) == found
    assert found.notes == ()
    assert found.better == sum(x > y for x, y in zip(*shares, strict=True))
    assert compare(b, a).difference.estimate.mean == pytest.approx(-found.difference.estimate.mean)


def test_scores_of_other_lengths_are_not_comparable_and_say_so(pair: tuple[Result, Result]) -> None:
    a, b = with_settings(pair[0], max_response_len=16_384), with_settings(pair[1], max_response_len=131_072)
    found = compare(a, b)
    assert "A was taken at up to 16,384 tokens and B at up to 131,072: they are not comparable" in found.notes[0]
    assert describe(a, b, found).startswith("note: A was taken at")
    assert compare(pair[0], with_settings(pair[1], top_p=0.95)).notes == ("top_p was 1 for A and 0.95 for B",)


def test_a_short_score_says_that_it_is_not_comparable_with_the_model_cards(pair: tuple[Result, Result]) -> None:
    assert "not comparable with one taken at 131,072 tokens" in pair[0].notes[0]


def test_other_problems_are_refused(server: KnownServer, pair: tuple[Result, Result], tmp_path: Path) -> None:
    other = write_questions(tmp_path / "other.jsonl", {"a": ("1+2=", 3), "z": ("4+5=", 9)})
    with pytest.raises(UserError, match=r"different problems, 6 of them only in one, such as b"):
        compare(pair[0], evaluate("--url", server.url, "--data", other, "--save", tmp_path / "other"))
    first, *rest = pair[1].problems
    relabelled = pair[1].model_copy(update={"problems": (first.model_copy(update={"label": "4"}), *rest)})
    with pytest.raises(UserError, match="different labels for problem a"):
        compare(pair[0], relabelled)


def test_the_command(
    pair: tuple[Result, Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b" / "result.json")]
    monkeypatch.setattr("sys.argv", words)
    main()
    said = capsys.readouterr().out
    assert f"A: avg@{N_SAMPLES} {pair[0].score.avg_at_n.mean:.1%}" in said
    assert "95% interval" in said
    monkeypatch.setattr("sys.argv", [*words, "--json"])
    main()
    found = json.loads(capsys.readouterr().out)
    assert found["difference"]["p_value"] == compare(*pair).difference.p_value


def test_labels_are_compared_as_integers(pair: tuple[Result, Result]) -> None:
    def relabelled(result: Result, label: str) -> Result:
        first, *rest = result.problems
        return result.model_copy(update={"problems": (first.model_copy(update={"label": label}), *rest)})

    assert compare(relabelled(pair[0], "3.0"), relabelled(pair[1], "003")) == compare(*pair)
    with pytest.raises(UserError, match="different labels for problem a"):
        compare(relabelled(pair[0], "3.5"), pair[1])


def test_what_may_not_be_compared_is_said(pair: tuple[Result, Result]) -> None:
    a, b = pair
    assert compare(a, a).notes == (
        "A and B are of one model with one seed: their samples are the same draw, and not independent",
    )
    longer = b.model_copy(update={"settings": b.settings.model_copy(update={"context_length": 131_072})})
    assert "the context was 64 tokens for A and 131,072 for B" in compare(a, longer).notes
    verdicts = b.score.verdicts | {Verdict.GRADER_FAILED: 2}
    failed = b.model_copy(update={"score": b.score.model_copy(update={"verdicts": verdicts})})
    assert compare(a, failed).notes == ("2 samples of B could not be graded, and count as not correct",)


def test_one_problem_is_compared_in_finite_numbers(
    server: KnownServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_questions(tmp_path / "one.jsonl", {"a": ("1+2=", 3)})
    for name, seed in (("a", 1), ("b", 2)):
        evaluate("--url", server.url, "--data", data, "--save", tmp_path / name, "--seed", seed)
    monkeypatch.setattr("sys.argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"])
    main()
    said = capsys.readouterr().out
    assert "Infinity" not in said
    estimate = json.loads(said)["difference"]["estimate"]
    assert (estimate["low"], estimate["high"]) == (-1, 1)
