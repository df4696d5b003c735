"""The command as a user starts it: the tiny model behind the embedded engine, killed and run again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from evaluation_support import QUESTIONS, lines_of

N_SAMPLES = 8
TOTAL = N_SAMPLES * len(QUESTIONS)


def command(checkpoint: Path, data: Path, save: Path, *more: str) -> list[str]:
    words = ["--model", checkpoint, "--data", data, "--save", save, "--n-samples", N_SAMPLES, "--max-response-len", 40]
    words += ["--instruction", "", "--engine", "embedded"]
    return [sys.executable, "-m", "evaluation.aime", *map(str, words), *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from evaluation_support import write_questions

    return write_questions(tmp_path_factory.mktemp("data") / "heldout.jsonl")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an evaluation that nothing disturbed."""
    save = tmp_path_factory.mktemp("evaluations") / "whole"
    ended = subprocess.run(
        command(checkpoint, questions, save), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert f"avg@{N_SAMPLES} " in ended.stdout
    assert f"report: {save}/report.html" in ended.stdout
    assert f"{TOTAL} of {TOTAL} samples, score so far" in ended.stderr
    return save


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_run_again_is_as_if_nothing_had_happened(
    number: signal.Signals, checkpoint: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    save = tmp_path / "killed"
    samples = save / "samples.jsonl"
    first = command(checkpoint, questions, save, "--concurrency", "1")
    process = subprocess.Popen(first, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    engines = [child for child in psutil.Process(process.pid).children() if "embedded" in " ".join(child.cmdline())]
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), said
    assert "Traceback" not in said
    assert engines
    psutil.wait_procs(engines, timeout=30)
    assert not any(engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE for engine in engines)
    kept = samples.read_bytes()
    made_before = kept.count(b"\n")
    assert 3 <= made_before < TOTAL
    assert not (save / "result.json").exists()

    ended = subprocess.run(
        command(checkpoint, questions, save), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert samples.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert len({(line["problem"], line["sample"]) for line in lines_of(samples)}) == len(lines_of(samples)) == TOTAL
    assert lines_of(save / "sessions.jsonl")[-1]["samples"] == TOTAL - made_before
    for file in ("result.json", "report.html", "settings.json"):
        assert (save / file).read_bytes() == (whole / file).read_bytes()
