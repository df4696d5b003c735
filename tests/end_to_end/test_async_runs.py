"""What a user relies on of a whole run whose rollouts are made while the trainer works."""

from collections import Counter
from pathlib import Path

import pytest
from run_support import (
    ONE_RANK,
    ROLLOUTS,
    TinyInputs,
    arguments,
    metrics,
    run,
    samples,
)

pytestmark = pytest.mark.slow


def test_every_sample_is_trained_once_and_none_is_too_old(inputs: TinyInputs, tmp_path: Path) -> None:
    """`test_async_loop` strikes such a loop everywhere, and resumes it."""
    more = "--async-rollout --max-staleness 2 --async-order finished --custom-rm-path run_support:slow_reward"
    command = arguments(inputs, tmp_path, "ahead", *more.split(), *ONE_RANK, "--skip-eval-before-train")
    status, output = run(command)
    assert status == 0, output
    lines, made = metrics(tmp_path / "ahead"), samples(tmp_path / "ahead")
    oldest = [line["staleness_max"] for line in lines]
    assert oldest[0] == 0 < max(oldest) <= 2
    assert len(lines) == ROLLOUTS
    assert Counter(sample["index"] // 4 for sample in made) == dict.fromkeys(range(max_draw(made) + 1), 4)
    assert all("tis_weight" in line for line in lines)


def max_draw(made: list[dict]) -> int:
    """The last draw that was trained; no filter drops any, and the first that are drawn finish."""
    return max(sample["index"] for sample in made) // 4
