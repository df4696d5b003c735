"""The command as a user starts it: the tiny model behind the embedded engine, killed and run again."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from evaluation_support import QUESTIONS, lines_of, write_questions
from forked_commands import Forked, run_module

N_SAMPLES = 8
TOTAL = N_SAMPLES * len(QUESTIONS)


def started(module: str, *words: object) -> Forked:
    """A command, as from a terminal."""
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return Forked(run_module, module, list(map(str, words)), environment)


def completed(command: Forked) -> str:
    """What it printed."""
    with command:
        status, output = command.end()
    assert status == 0, output
    return output


def evaluation(data: Path, save: Path, *more: object) -> Forked:
    words = ["--data", data, "--save", save, "--n-samples", N_SAMPLES, "--max-response-len", 40, "--instruction", ""]
    return started("evaluation.aime", *words, "--engine", "embedded", *more)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("data") / "heldout.jsonl")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an evaluation that nothing disturbed."""
    save = tmp_path_factory.mktemp("evaluations") / "whole"
    said = completed(evaluation(questions, save, "--model", checkpoint))
    assert f"avg@{N_SAMPLES} " in said
    assert f"report: {save}/report.html" in said
    assert f"{TOTAL} of {TOTAL} samples, score so far" in said
    return save


def stop(command: Forked, samples: Path, count: int, number: signal.Signals) -> bytes:
    """Sends the signal once `count` samples are stored. The file's content when nobody is left to write to it."""
    pid = command.process.pid
    deadline = time.monotonic() + 600
    while not (samples.exists() and samples.read_bytes().count(b"\n") >= count):
        assert command.process.is_alive(), command.end()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    engines = [child for child in psutil.Process(pid).children() if "embedded" in " ".join(child.cmdline())]
    os.kill(pid, number)
    status, said = command.end()
    assert status == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number], said
    assert "Traceback" not in said
    assert engines
    psutil.wait_procs(engines, timeout=120)
    assert not any(engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE for engine in engines)
    return samples.read_bytes()


def test_killed_and_run_again_is_as_if_nothing_had_happened(
    checkpoint: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    save = tmp_path / "killed"
    samples = save / "samples.jsonl"
    kept, made = b"", 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        with evaluation(questions, save, "--model", checkpoint, "--concurrency", 1) as slowly:
            now = stop(slowly, samples, made + 3, number)
        assert now.startswith(kept)
        kept = now[: now.rindex(b"\n") + 1]
        made = kept.count(b"\n")
        assert made < TOTAL
        assert not (save / "result.json").exists()
    completed(evaluation(questions, save, "--model", checkpoint))
    assert samples.read_bytes().startswith(kept)
    assert len({(line["problem"], line["sample"]) for line in lines_of(samples)}) == len(lines_of(samples)) == TOTAL
    assert lines_of(save / "sessions.jsonl")[-1]["samples"] == TOTAL - made
    for file in ("result.json", "report.html", "settings.json"):
        assert (save / file).read_bytes() == (whole / file).read_bytes()


def test_a_checkpoint_of_the_trainer_answers_as_the_model_it_was_made_from(
    checkpoint: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    torch_dist = tmp_path / "torch_dist"
    words = ("--recipe", "tiny", "--hf-checkpoint", checkpoint, "--save", torch_dist)
    completed(started("recipe.conversion.convert", *words))
    save = tmp_path / "of checkpoint"
    completed(evaluation(questions, save, "--checkpoint", torch_dist, "--hf-checkpoint", checkpoint))
    first, second = (
        sorted((line["problem"], line["sample"], line["response"]) for line in lines_of(folder / "samples.jsonl"))
        for folder in (whole, save)
    )
    assert first == second
    assert sorted(file.name for file in save.iterdir()) == sorted(file.name for file in whole.iterdir())
