"""The commands of the README."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation.options import parse

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^(?:\.venv/bin/|\+ \S+)(.*evaluation\.aime.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def last_line(*command: str) -> str:
    # A make that runs these tests has its own say in what another prints.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
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


def test_the_task_and_its_profile() -> None:
    assert len(COMMANDS) == 2
    readme = next(line for line in (ROOT / "README.md").read_text().splitlines() if "invoke eval" in line)
    words = readme.removeprefix(".venv/bin/invoke ").split()
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
