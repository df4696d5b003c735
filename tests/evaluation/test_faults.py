"""Servers that fail, and runs that go on after them: every sample once, counted as what it is."""

import errno
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from evaluation_support import (
    MAX_TOKENS,
    N_SAMPLES,
    QUESTIONS,
    STALL_S,
    KnownServer,
    evaluate,
    kind_of,
    lines_of,
    open_one,
    serving,
)

from evaluation.grading import Verdict
from evaluation.result import read_result
from recipe.system.errors import UserError

TOTAL = N_SAMPLES * len(QUESTIONS)


def fail_first(times: int, status: int = 500):
    return lambda _, before: status if before < times else None


def test_every_sample_is_counted_as_what_it_is(server: KnownServer, data: Path, tmp_path: Path) -> None:
    result = evaluate("--url", server.url, "--data", data, "--save", tmp_path / "out")
    samples = [sample for problem in result.problems for sample in problem.samples]
    assert len({sample.seed for sample in samples}) == len(samples) == TOTAL
    assert [sample.verdict for sample in samples] == [kind_of(sample.seed) for sample in samples]
    expected = Counter(kind_of(sample.seed) for sample in samples)
    assert result.score.verdicts == {verdict: expected[verdict] for verdict in Verdict}
    assert len([count for count in expected.values() if count]) == 4
    assert result.score.avg_at_n.mean == pytest.approx(expected[Verdict.CORRECT] / TOTAL)
    assert result.score.truncated_share == expected[Verdict.TRUNCATED] / TOTAL
    assert result.score.no_answer_share == expected[Verdict.NO_ANSWER] / TOTAL
    assert result.score.pass_at[1].mean == pytest.approx(result.score.avg_at_n.mean)
    assert result.score.tokens.max == MAX_TOKENS
    assert all(count == 1 for count in server.asked.values())
    assert read_result(tmp_path / "out") == result


def test_errors_of_the_server_are_asked_again_and_change_nothing(
    server: KnownServer, data: Path, tmp_path: Path
) -> None:
    undisturbed = evaluate("--url", server.url, "--data", data, "--save", tmp_path / "undisturbed")
    server.asked.clear()
    server.fault = fail_first(2)
    disturbed = evaluate("--url", server.url, "--data", data, "--save", tmp_path / "disturbed")
    assert disturbed == undisturbed
    assert set(server.asked.values()) == {3}
    assert lines_of(tmp_path / "disturbed" / "sessions.jsonl")[0]["retries"] == 2 * TOTAL


def test_a_sample_that_stalls_is_missed_in_bounded_time_and_made_by_the_next_run(
    server: KnownServer, data: Path, tmp_path: Path
) -> None:
    words = ("--url", server.url, "--data", data, "--save", tmp_path / "out")
    whole = evaluate(*words[:4], "--save", tmp_path / "whole")
    stalled = whole.problems[2].samples[1].seed
    server.asked.clear()
    server.fault = lambda seed, _: server.stall() if seed == stalled else None
    with pytest.raises(UserError, match=f"1 of {TOTAL} samples are missing.*did not answer.*the same command again"):
        evaluate(*words, "--request-timeout-s", 3, "--max-retries", 1)
    assert not (tmp_path / "out" / "result.json").exists()
    assert server.asked[stalled] == 2
    server.fault = None
    server.asked.clear()
    assert evaluate(*words) == whole
    assert server.asked == {stalled: 1}


def test_a_server_that_dies_ends_the_run_at_once(server: KnownServer, data: Path, tmp_path: Path) -> None:
    def die(seed: int, before: int) -> int | None:
        server.healthy = len(server.asked) < 10
        return None if server.healthy else 500

    server.fault = die
    with pytest.raises(UserError, match=f"of {TOTAL} samples are missing.*answered 500"):
        evaluate(
            "--url", server.url, "--data", data, "--save", tmp_path / "out", "--concurrency", 1, "--max-retries", 1
        )
    assert len(lines_of(tmp_path / "out" / "samples.jsonl")) == 9
    assert len(server.asked) <= 11


def test_answers_that_are_none_end_the_run_after_a_few(server: KnownServer, data: Path, tmp_path: Path) -> None:
    server.fault = lambda *_: "[{}]"
    with pytest.raises(UserError, match="the engine's answer is not SGLang's"):
        evaluate(
            *("--url", server.url, "--data", data, "--save", tmp_path / "out"),
            *("--concurrency", 1, "--max-failures", 3),
        )
    assert server.asked.total() == 3


def test_a_request_that_is_refused_ends_the_run(server: KnownServer, data: Path, tmp_path: Path) -> None:
    server.fault = fail_first(99, status=400)
    with pytest.raises(UserError, match="refused with status 400"):
        evaluate("--url", server.url, "--data", data, "--save", tmp_path / "out", "--concurrency", 1)
    assert server.asked.total() == 1


def test_a_server_that_changes_its_weights_is_found_out(server: KnownServer, data: Path, tmp_path: Path) -> None:
    evaluation = open_one("--url", server.url, "--data", data, "--save", tmp_path / "out")
    server.version = "2"
    with pytest.raises(UserError, match="made under weight version 2, not 1 as the others"):
        evaluation.complete()


def test_a_complete_evaluation_asks_for_nothing(server: KnownServer, data: Path, tmp_path: Path) -> None:
    words = ("--url", server.url, "--data", data, "--save", tmp_path / "out")
    evaluate(*words)
    first = (tmp_path / "out" / "result.json").read_bytes()
    server.asked.clear()
    evaluate(*words)
    assert not server.asked
    assert (tmp_path / "out" / "result.json").read_bytes() == first


def test_a_line_that_a_crash_cut_off_is_made_again(server: KnownServer, data: Path, tmp_path: Path) -> None:
    words = ("--url", server.url, "--data", data, "--save", tmp_path / "out")
    whole = evaluate(*words)
    samples = tmp_path / "out" / "samples.jsonl"
    samples.write_bytes(samples.read_bytes()[:-20])
    server.asked.clear()
    assert evaluate(*words) == whole
    assert server.asked.total() == 1
    assert len({(line["problem"], line["sample"]) for line in lines_of(samples)}) == len(lines_of(samples)) == TOTAL


def test_a_full_disk_is_one_sentence(
    server: KnownServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluation = open_one("--url", server.url, "--data", data, "--save", tmp_path / "out")

    def full(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("samples.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"the disk is full: .*samples\.jsonl could not be written"):
        evaluation.complete()


def test_a_server_may_go_on_at_another_address_and_a_model_at_another_path(
    server: KnownServer, data: Path, tmp_path: Path
) -> None:
    whole = evaluate("--url", server.url, "--data", data, "--save", tmp_path / "out")
    with serving(KnownServer(server.labels, server.checkpoint)) as moved:
        assert evaluate("--url", moved.url, "--data", data, "--save", tmp_path / "out") == whole
        assert not moved.asked
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(server.checkpoint)
    for path in (server.checkpoint, elsewhere):
        open_one("--model", path, "--data", data, "--save", tmp_path / "of model").__exit__()


def test_a_directory_is_not_continued_with_other_weights(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    words = ("--model", model, "--data", data, "--save", tmp_path / "out", "--engine", "embedded")
    open_one(*words).__exit__()
    with pytest.raises(UserError, match=r"engine_args was \[\] and is \['--threads', '1'\]"):
        open_one(*words, "--engine-args", "--threads 1")
    [weights] = model.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="model_sha256 was"):
        open_one(*words)


@pytest.mark.parametrize("change", [{"version": "2"}, {"dtype": "float32"}])
def test_a_directory_is_not_continued_with_another_server(
    server: KnownServer, data: Path, tmp_path: Path, change: dict[str, str]
) -> None:
    words = ("--url", server.url, "--data", data, "--save", tmp_path / "out")
    evaluate(*words)
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(UserError, match="model_sha256 was"):
        open_one(*words)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("stalls", "no server has passed a health check for 3 s"), ("slow", "no sample was finished for 3 s")],
)
def test_a_server_that_stalls_ends_the_run_in_bounded_time(
    server: KnownServer, data: Path, tmp_path: Path, fault: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipe.rollout.client.HEALTH_TIMEOUT_S", 0.2)

    answered = iter(range(7))

    def stall(_: int, __: int) -> int | None:
        if next(answered, None) is not None:
            return None
        server.stalls = fault == "stalls"
        server.stall()
        return 500

    server.fault = stall
    health_s, stall_s = (3, STALL_S) if fault == "stalls" else (STALL_S, 3)
    limits = ("--health-timeout-s", health_s, "--stall-timeout-s", stall_s)
    with pytest.raises(UserError, match=rf"samples are missing.*{problem}.*the same command again"):
        evaluate("--url", server.url, "--data", data, "--save", tmp_path / "out", "--concurrency", 4, *limits)
    assert len(lines_of(tmp_path / "out" / "samples.jsonl")) == 7


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("<html>", "answered with damaged JSON"),
        ("{", "answered with damaged JSON"),
        ("[]", "answered 0 of 1 samples"),
        ("[5]", "is not SGLang's"),
        (
            '[{"meta_info": {"finish_reason": {"type": "stop"}, "weight_version": "1", "output_token_logprobs": []}, '
            '"output_ids": [], "text": 5}]',
            "the text is 5",
        ),
    ],
)
def test_answers_that_cannot_be_read(
    server: KnownServer, data: Path, tmp_path: Path, answer: str, problem: str
) -> None:
    server.fault = lambda *_: answer
    with pytest.raises(UserError, match=problem):
        evaluate(
            *("--url", server.url, "--data", data, "--save", tmp_path / "out"),
            *("--concurrency", 1, "--max-failures", 2),
        )
