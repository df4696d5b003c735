"""Verdicts: the conformance suite, hostile responses, and the command."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from grading_support import HOSTILE_LABEL, as_response, busy_processes, conformance_cases, hostile_responses

from evaluation.grade import main
from evaluation.grading import Judge, Judgement, Response, Verdict, aime_label_problem
from recipe.rewards import REWARD_RULES, Grader, GradeRequest, RewardType
from recipe.rewards.plain import canonical_integer
from recipe.system.errors import UserError, run_main

CASES = conformance_cases()


def as_input(*lines: object) -> bytes:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    return text.encode("utf-8", "surrogatepass")


def grade(*lines: object, words: Iterable[str] = ()) -> tuple[int, list[dict[str, str]], str]:
    """What `python -m evaluation.grade` makes of the lines: exit status, verdicts, and what it says."""
    ended = subprocess.run(
        [sys.executable, "-m", "evaluation.grade", *words],
        input=as_input(*lines),
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        timeout=900,
    )
    return ended.returncode, [json.loads(line) for line in ended.stdout.splitlines()], ended.stderr.decode()


@pytest.fixture(scope="module")
def judgements() -> list[Judgement]:
    """Of the whole suite, off the main thread, while eight processes want the cores."""
    found: list[Judgement] = []

    def judge() -> None:
        with Judge(timeout_s=10) as judging:
            found.extend(judging.judge([as_response(case) for case in CASES]))

    thread = threading.Thread(target=judge)
    with busy_processes(8):
        thread.start()
        thread.join(timeout=900)
    assert not thread.is_alive()
    return found


def test_the_suite_is_large_and_no_case_is_there_twice() -> None:
    assert len(CASES) >= 1200
    assert sum(canonical_integer(str(case["label"])) is None for case in CASES) >= 400
    assert len({json.dumps({**case, "why": "", "verdict": "", "answer": ""}) for case in CASES}) == len(CASES)
    assert set(Counter(case["verdict"] for case in CASES)) == set(Verdict)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"line-{number + 1}")
def test_conformance(number: int, judgements: list[Judgement]) -> None:
    case = CASES[number]
    found = judgements[number]
    assert (found.verdict, found.answer) == (case["verdict"], case["answer"]), (case, found)


def test_training_takes_no_wrong_answer_of_the_suite_for_right() -> None:
    wrong = [case for case in CASES if case["verdict"] == Verdict.WRONG and "</think>" in case["response"]]
    with Grader(REWARD_RULES[RewardType.DEEPSCALER]) as grader:
        grades = grader.grade([GradeRequest("", case["response"], str(case["label"])) for case in wrong])
    assert len(wrong) > 150
    assert [case["response"] for case, grade in zip(wrong, grades, strict=True) if grade.reward] == []


def test_a_judgement_says_why() -> None:
    with Judge() as judge:
        given = judge.judge(
            [
                Response(r"\boxed{025}", "25"),
                Response(r"\boxed{\frac{60}{2}}", "25"),
                Response(r"a</think>\boxed{", "25", truncated=True),
                Response(r"\boxed{25}", "25", prompt="<think>"),
            ]
        )
    assert given == [
        Judgement(Verdict.CORRECT, "025", "025 is 25", "25"),
        Judgement(Verdict.WRONG, r"\frac{60}{2}", r"\frac{60}{2} is not 25", "30"),
        Judgement(Verdict.TRUNCATED, None, r"cut off, and the last \boxed{ is never closed"),
        Judgement(Verdict.NO_ANSWER, None, "the thinking part never ends"),
    ]


def test_all_spellings_of_an_answer_have_one_value() -> None:
    spellings = [
        "30",
        "030",
        "30.0",
        "x = 30",
        r"30 \text{ cm}",
        r"\frac{60}{2}",
        "5(6)",
        r"\textbf{30}",
        "28 + 2 = 30",
    ]
    others = ["31", "72 = 73", r"\text{none}", "x + 1", "25, 30"]
    with Judge() as judge:
        found = judge.judge([Response(rf"\boxed{{{answer}}}", "25") for answer in [*spellings, *others]])
    assert {judgement.verdict for judgement in found} == {Verdict.WRONG}
    assert {judgement.value for judgement in found[: len(spellings)]} == {"30"}
    assert len({judgement.value for judgement in found[len(spellings) - 1 :]}) == 1 + len(others)


def test_a_thousand_hostile_responses() -> None:
    lines = [{"response": response, "label": HOSTILE_LABEL} for response in hostile_responses(1000)]
    status, verdicts, said = grade(*lines, words=["--timeout-s", "0.5"])
    assert (status, said, len(verdicts)) == (0, "", 1000)
    assert [verdict for verdict in verdicts if verdict["verdict"] == Verdict.CORRECT] == []
    assert Counter(verdict["verdict"] for verdict in verdicts)[Verdict.GRADER_FAILED] <= 40


def test_the_command_writes_a_verdict_a_line_in_order() -> None:
    responses = [
        {"response": r"a</think>\boxed{025}", "label": 25},
        {"response": r"a</think>\boxed{30}", "label": "25", "finish_reason": "stop"},
        "",
        {"response": "thoughts", "label": "25", "finish_reason": "length"},
        {"response": "thoughts", "label": "25", "finish_reason": {"type": "length", "length": 16384}},
        {"response": "a</think>", "label": "25", "finish_reason": {"type": "stop", "matched": 7}},
        {"response": r"\boxed{25}", "label": "25", "prompt": "<think>"},
        {"response": r"\boxed{e^{e^{e^{e^{e}}}}}", "label": "25"},
    ]
    status, verdicts, said = grade(*responses, words=["--timeout-s", "0.5", "--workers", "1"])
    assert (status, said) == (0, "")
    assert [verdict["verdict"] for verdict in verdicts] == [
        "correct",
        "wrong",
        "truncated",
        "truncated",
        "no_answer",
        "no_answer",
        "grader_failed",
    ]
    assert [verdict["answer"] for verdict in verdicts] == ["025", "30", None, None, None, None, "e^{e^{e^{e^{e}}}}"]
    assert all(list(verdict) == ["verdict", "answer", "reason"] for verdict in verdicts)
    assert all(verdict["reason"] for verdict in verdicts)


def test_the_command_grades_by_the_rules_of_a_reward() -> None:
    responses = [
        {"response": r"\boxed{25}", "label": "25"},
        {"response": r"a</think>\boxed{25}", "label": "25"},
        {"response": "Answer: 25", "label": "25"},
        {"response": r"<think>\boxed{25}", "label": "25"},
    ]
    verdicts = {
        kind: [row["verdict"] for row in grade(*responses, words=["--rm-type", kind])[1]] for kind in RewardType
    }
    assert verdicts == {
        RewardType.DEEPSCALER: ["no_answer", "correct", "no_answer", "no_answer"],
        RewardType.MATH: ["correct", "correct", "no_answer", "no_answer"],
        RewardType.DAPO: ["correct", "correct", "correct", "no_answer"],
    }
    status, _, said = grade({"response": "Answer: 1/2", "label": "1/2"}, words=["--rm-type", "dapo"])
    assert (status, said) == (
        2,
        "error: standard input, line 1: the label '1/2' is no answer: it is no integer, as --rm-type dapo needs\n",
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"response": "x", "label": NaN}', "line 2: the label 'nan' is no answer: it is not a number"),
        ({"response": "x", "label": "9" * 5000}, "is no answer: it is longer than 1,000 characters"),
        ({"response": "x", "label": "2\ud800"}, "is no answer: it holds half of a character"),
        ({"response": "x", "label": r"1, \dots, n"}, "line 2: the label '1, \\\\dots, n' is no answer"),
        ({"response": "x"}, "line 2: there is no 'label' among 'response'"),
        ({"label": "1"}, "line 2: there is no 'response' among 'label'"),
        ({"response": "x", "label": ""}, 'line 2: the label "" is no answer'),
        ({"response": "x", "label": None}, "line 2: the label null is no answer"),
        ({"response": 5, "label": "1"}, "line 2: 'response' is not a text"),
        ({"response": "x", "label": "1", "prompt": []}, "line 2: 'prompt' is not a text"),
        (
            {"response": "x", "label": "1", "finish_reason": []},
            "line 2: 'finish_reason' is neither a text nor an object",
        ),
        ("[]", "line 2: not a JSON object"),
        ('{"response": "x', "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not valid JSON"),
        ("9" * 5000, "line 2: not valid JSON"),
    ],
)
def test_a_bad_line_is_named_after_the_verdicts_of_those_before_it(
    line: object, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(as_input({"response": "x", "label": "1"}, line))))
    monkeypatch.setattr(sys, "argv", ["grade"])
    with pytest.raises(UserError, match=re.escape(problem)):
        main()
    [verdict] = capsys.readouterr().out.splitlines()
    assert json.loads(verdict)["verdict"] == "no_answer"


def test_a_reader_who_leaves_ends_the_command_silently(tmp_path: Path) -> None:
    """With the status that shells know of it: 128 and SIGPIPE."""
    responses = tmp_path / "responses.jsonl"
    responses.write_text('{"response": "", "label": "25"}\n' * 20_000)
    ended = subprocess.run(
        [
            "bash",
            "-c",
            f"{shlex.quote(sys.executable)} -m evaluation.grade < responses.jsonl | head -1; exit ${{PIPESTATUS[0]}}",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")
    assert json.loads(ended.stdout)["verdict"] == Verdict.NO_ANSWER


def test_a_broken_pipe_inside_a_command_is_no_reader_who_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def breaks() -> None:
        raise BrokenPipeError("of a worker")

    with pytest.raises(BrokenPipeError, match="of a worker"):
        run_main(breaks)


def test_labels_of_aime() -> None:
    for label in ("0", "7", "025", "999"):
        assert aime_label_problem(label) is None
    assert aime_label_problem("1000") == "is not between 0 and 999"
    assert aime_label_problem("-1") == "is not between 0 and 999"
    assert aime_label_problem(r"\frac{1}{2}") == "is no integer"
