"""A run's trainer as one process that only scores."""

import atexit
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from recipe.again.alone import in_process
from recipe.again.scores import settings_of
from recipe.config.flags import parse_command_line
from recipe.config.loading import build_config, read_settings
from recipe.system.errors import UserError


def end_late(ended: Path) -> None:
    atexit.register(ended.touch)
    atexit.register(time.sleep, 600)  # comes first; what torch compiles with takes five minutes


def answer_and_end_late(ended: Path) -> int:
    end_late(ended)
    return 7


def refuse() -> None:
    raise UserError("no such weights: name others")


class OfTwoParts(BaseException):
    """No Exception, and one that pickle makes nothing of."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def fail_and_end_late(ended: Path) -> None:
    end_late(ended)
    raise OfTwoParts("half ", "a reason")


def die() -> None:
    os._exit(3)


def test_a_process_that_has_answered_is_not_waited_for(tmp_path: Path) -> None:
    assert in_process(answer_and_end_late, tmp_path / "answered") == 7
    with pytest.raises(RuntimeError, match="OfTwoParts: half a reason"):
        in_process(fail_and_end_late, tmp_path / "failed")
    assert multiprocessing.active_children() == []
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_in_it_is_told_here() -> None:
    with pytest.raises(UserError, match="no such weights: name others"):
        in_process(refuse)
    with pytest.raises(RuntimeError, match="the process of die ended with status 3"):
        in_process(die)


def test_fp32_is_scored_by_an_attention_that_has_it() -> None:
    command = parse_command_line(["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", "x", "--prompt-data", "y"])
    config = build_config(read_settings(command))
    assert config.perf.attention_backend == "flash"
    assert settings_of(config, Path("weights"), bf16=True).perf.attention_backend == "flash"
    assert settings_of(config, Path("weights"), bf16=False).perf.attention_backend == "auto"
