"""The command as a user starts it: the tiny model behind the embedded engine, killed and run again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from evaluation_support import QUESTIONS, lines_of, write_questions

N_SAMPLES = 8
TOTAL = N_SAMPLES * len(QUESTIONS)


def evaluation(data: Path, save: Path, *more: object) -> list[str]:
    words = ["--data", data, "--save", save, "--n-samples", N_SAMPLES, "--max-response-len", 40, "--instruction", ""]
    return [sys.executable, "-m", "evaluation.aime", *map(str, [*words, "--engine", "embedded", *more])]


def command(checkpoint: Path, data: Path, save: Path, *more: object) -> list[str]:
    return evaluation(data, save, "--model", checkpoint, *more)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


def stop(process: subprocess.Popen[str], samples: Path, count: int, number: signal.Signals) -> bytes:
    """Sends the signal once `count` samples are stored. The file's content when nobody is left to write to it."""
    deadline = time.monotonic() + 200
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= count):
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
    return samples.read_bytes()


def test_killed_and_run_again_is_as_if_nothing_had_happened(
    checkpoint: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    save = tmp_path / "killed"
    samples = save / "samples.jsonl"
    slowly = command(checkpoint, questions, save, "--concurrency", "1")
    kept, made = b"", 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(slowly, env=environment(), stderr=subprocess.PIPE, text=True)
        now = stop(process, samples, made + 3, number)
        assert now.startswith(kept)
        kept = now[: now.rindex(b"\n") + 1]
        made = kept.count(b"\n")
        assert made < TOTAL
        assert not (save / "result.json").exists()
    ended = subprocess.run(
        command(checkpoint, questions, save), env=environment(), capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    assert samples.read_bytes().startswith(kept)
    assert len({(line["problem"], line["sample"]) for line in lines_of(samples)}) == len(lines_of(samples)) == TOTAL
    assert lines_of(save / "sessions.jsonl")[-1]["samples"] == TOTAL - made
    for file in ("result.json", "report.html", "settings.json"):
        assert (save / file).read_bytes() == (whole / file).read_bytes()


def test_a_checkpoint_of_the_trainer_answers_as_the_model_it_was_made_from(
    checkpoint: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    torch_dist = tmp_path / "torch_dist"
    convert = [
        sys.executable,
        "-m",
        "recipe.conversion.convert",
        "--recipe",
        "tiny",
        "--hf-checkpoint",
        str(checkpoint),
    ]
    subprocess.run([*convert, "--save", str(torch_dist)], env=environment(), check=True, timeout=240)
    save = tmp_path / "of checkpoint"
    words = evaluation(questions, save, "--checkpoint", torch_dist, "--hf-checkpoint", checkpoint)
    ended = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    first, second = (
        sorted((line["problem"], line["sample"], line["response"]) for line in lines_of(folder / "samples.jsonl"))
        for folder in (whole, save)
    )
    assert first == second
    assert sorted(file.name for file in save.iterdir()) == sorted(file.name for file in whole.iterdir())
