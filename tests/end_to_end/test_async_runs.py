"""What a user relies on of a whole run whose rollouts are made while the trainer works."""

from collections import Counter
from pathlib import Path

import pytest
from run_support import (
    ONE_RANK,
    ROLLOUTS,
    TinyInputs,
    arguments,
    kill_hard,
    leaves_no_process,
    metrics,
    run,
    samples,
    start,
    wait_for_step,
)

pytestmark = pytest.mark.slow


def test_killed_and_resumed_every_sample_is_trained_once_and_none_is_too_old(
    inputs: TinyInputs, tmp_path: Path
) -> None:
    more = "--async-rollout --max-staleness 2 --async-order finished --custom-rm-path run_support:slow_reward"
    command = arguments(inputs, tmp_path, "ahead", *more.split(), *ONE_RANK, "--skip-eval-before-train")
    with leaves_no_process(str(tmp_path)):
        process = start(command)
        wait_for_step(process, tmp_path / "ahead", 2)
        kill_hard(process)
    status, output = run([*command, "--load", str(tmp_path / "ahead" / "checkpoints")])
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
