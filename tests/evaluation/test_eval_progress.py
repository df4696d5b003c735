"""What an evaluation says while it goes."""

import pytest

from evaluation.grading import Verdict
from evaluation.progress import EvaluationProgress


def test_time_to_go_counts_from_when_generation_began(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = EvaluationProgress(10)
    progress.add("a", Verdict.CORRECT, 100, truncated=False, is_new=False)
    now = 1000.0  # the engine starts
    progress.begin()
    for number in range(4):
        now += 10
        progress.add("b", Verdict.WRONG, 50, truncated=number == 0, is_new=True)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "5 of 10 samples, score so far 50.0% on 2 problems, 1 cut off, 5 tokens/s, 0:50 to go"
