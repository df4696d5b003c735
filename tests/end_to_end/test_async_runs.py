"""What a user relies on of a whole run whose rollouts are made while the trainer works."""

import json
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


def test_every_sample_of_mixed_files_is_trained_once_graded_by_its_line_and_not_too_old(
    inputs: TinyInputs, tmp_path: Path
) -> None:
    """`test_async_loop` strikes such a loop everywhere, and resumes it."""
    questions = list(map(json.loads, inputs.train.read_text().splitlines()))
    by_lines = {"sums": questions[::2], "others": [one | {"metadata": {"rm_type": "dapo"}} for one in questions[1::2]]}
    for name, lines in by_lines.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [f"{tmp_path}/sums.jsonl:0.75", f"{tmp_path}/others.jsonl:0.25"]
    more = "--async-rollout --max-staleness 2 --async-order finished --rm-type math --custom-rm-path none"
    command = arguments(inputs, tmp_path, "ahead", *more.split(), *ONE_RANK, "--skip-eval-before-train")
    status, output = run([*command, "--prompt-data", *files])
    assert status == 0, output
    steps, made = metrics(tmp_path / "ahead"), samples(tmp_path / "ahead")
    oldest = [line["staleness_max"] for line in steps]
    assert oldest[0] == 0 < max(oldest) <= 2
    assert len(steps) == ROLLOUTS
    assert all("tis_weight" in line for line in steps)
    # No filter drops any, and the first draws finish: a quarter of them is of the second file.
    assert Counter(sample["index"] // 4 for sample in made) == dict.fromkeys(range(max_draw(made) + 1), 4)
    assert Counter(sample["source"] for sample in made) == {"sums": 12 * ROLLOUTS, "others": 4 * ROLLOUTS}
    for name in by_lines:
        counted = sum(line.get(f"source/{name}_samples", 0) for line in steps)
        assert counted == sum(sample["source"] == name for sample in made)
    for sample in made:
        question = by_lines[sample["source"]][sample["prompt_index"]]
        assert question["prompt"][0]["content"] in sample["prompt"]
        assert sample["reward"] in ({0.0, 1.0} if sample["source"] == "sums" else {-1.0, 1.0})


def max_draw(made: list[dict]) -> int:
    """The last draw that was trained."""
    return max(sample["index"] for sample in made) // 4
