"""The commands of docs/evaluation.md."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_support import KnownServer, evaluate
from grading_support import conformance_cases

from evaluation.options import parse
from recipe.config import help_text

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()
COMMANDS = re.findall(r"^(?:\.venv/bin/|\+ \S+)(.*evaluation\.aime.*)$", PAGE, re.MULTILINE)
OTHERS = re.findall(r"^\.venv/bin/python -m evaluation\.(?:compare|grade) .*$", PAGE, re.MULTILINE)


def last_line(*command: str) -> str:
    # A make that runs these tests has its own say in what another prints.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=True)
    return ended.stdout.strip().splitlines()[-1]


def arguments_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return words[words.index("evaluation.aime") + 1 :]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command: str) -> None:
    arguments = parse(None, arguments_of(command))
    assert (arguments.n_samples, arguments.max_response_len, arguments.temperature, arguments.top_p) == (
        16,
        16384,
        1,
        1,
    )


def test_results_are_compared_and_responses_graded_by_the_commands_of_the_page(
    server: KnownServer, data: Path, tmp_path: Path
) -> None:
    """As they stand there, in a directory with what they name."""
    for name, seed in (("eval-A", 1), ("eval-B", 2)):
        evaluate("--url", server.url, "--data", data, "--save", tmp_path / "runs" / name, "--seed", seed)
    (tmp_path / "responses.jsonl").write_text('{"response": "a</think>\\\\boxed{025}", "label": 25}\n')
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert len(OTHERS) == 2
    said = ""
    for command in OTHERS:
        line = command.replace(".venv/bin/python", shlex.quote(sys.executable))
        ended = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert ended.returncode == 0, ended.stderr
        said += ended.stdout
    assert "A - B: " in said
    verdict = json.loads((tmp_path / "verdicts.jsonl").read_text())
    assert (verdict["verdict"], verdict["answer"]) == ("correct", "025")


def test_flags_of_the_page_are_training_s() -> None:
    part = PAGE[PAGE.index("## In training") :]
    flags = set(re.findall(r"`(--eval-[a-z-]+)", part))
    assert flags == {
        "--eval-prompt-data",
        "--eval-instruction",
        "--eval-labels",
        "--eval-input-key",
        "--eval-label-key",
    }
    assert all(flag in help_text() for flag in flags)


def test_the_page_tells_the_number_of_cases() -> None:
    assert f"conformance.jsonl` has {len(conformance_cases()):,} cases" in PAGE


def test_the_task_and_its_profile() -> None:
    assert len(COMMANDS) == 2
    shown = next(line for line in PAGE.splitlines() if "invoke eval" in line)
    words = shown.removeprefix(".venv/bin/invoke ").split()
    command = last_line(sys.executable, "-m", "invoke", *words, "--dry-run", "--args", "--engine-args '--tp-size 8'")
    arguments = parse(None, arguments_of(command))
    assert (arguments.max_response_len, arguments.temperature, arguments.top_p) == (131_072, 1, 0.95)
    assert arguments.engine_args == "--tp-size 8"
    assert arguments.model == Path("/data/GLM-4.7-Flash")


def test_make_eval_scores_the_tiny_model_or_another() -> None:
    tiny = parse(None, arguments_of(last_line("make", "--dry-run", "eval")))
    assert (tiny.model, tiny.instruction) == (Path("build/tiny/hf"), "")
    other = parse(None, arguments_of(last_line("make", "--dry-run", "eval", "MODEL=m", "DATA=d", "ARGS=--seed 3")))
    assert (other.model, other.data, other.seed, other.n_samples) == (Path("m"), Path("d"), 3, 16)
    assert "\\boxed{}" in other.instruction
