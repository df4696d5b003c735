import json
import subprocess
import sys

import pytest

from recipe.data.arithmetic_task import split_sums, write_task
from recipe.rewards import REWARD_RULES, Grader, GradeRequest, RewardType
from recipe.system.errors import UserError


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_sum_is_there_once_and_none_is_on_both_sides_in_any_order():
    train, held = split_sums(seed=1, max_operand=7, heldout=64)
    assert len(held) == 64
    assert len(set(train + held)) == len(train) + len(held) == 8**3
    seen = {tuple(sorted(item.operands)) for item in train}
    assert not any(tuple(sorted(item.operands)) in seen for item in held)


def test_orders_that_are_not_kept_together_leave_all_sums_there_once():
    train, held = split_sums(seed=1, max_operand=7, heldout=64, keep_orders_together=False)
    assert len(held) == 64
    assert len(set(train + held)) == len(train) + len(held) == 8**3
    seen = {tuple(sorted(item.operands)) for item in train}
    assert sum(tuple(sorted(item.operands)) in seen for item in held) > 48


def test_the_seed_decides_everything(tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        write_task(tmp_path / name, seed, max_operand=9, heldout=16)
    first, second, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert first == second != other


def test_the_warm_up_answers_are_right_and_some_are_boxed(tmp_path):
    write_task(tmp_path, 1, max_operand=9, heldout=16)
    warmup = lines(tmp_path / "warmup.jsonl")
    boxed = [line for line in warmup if "boxed" in line["response"]]
    assert 0.3 < len(boxed) / len(warmup) < 0.5
    with Grader(REWARD_RULES[RewardType.DEEPSCALER]) as grader:
        grades = grader.grade([GradeRequest("", line["response"], line["label"]) for line in boxed])
    assert {grade.reward for grade in grades} == {1.0}
    for line in warmup:
        operands = line["prompt"][0]["content"].rstrip("=").split("+")
        assert int(line["label"]) == sum(map(int, operands))
        assert line["label"] in line["response"]


def test_the_command_writes_both_files(tmp_path):
    command = [sys.executable, "-m", "recipe.data.arithmetic_task", "--output", str(tmp_path / "new"), "--seed", "7"]
    subprocess.run(command, check=True)
    train, held = lines(tmp_path / "new/train.jsonl"), lines(tmp_path / "new/heldout.jsonl")
    assert (len(train), len(held)) == (800, 200)
    assert train[0].keys() == {"prompt", "label"}
    assert lines(tmp_path / "new/warmup.jsonl")[0].keys() == {"prompt", "label", "response"}
    assert held[0].keys() == {"prompt", "label"}
    assert held[0]["prompt"][0]["role"] == "user"


@pytest.mark.parametrize("heldout", [0, 27])
def test_holding_out_nothing_or_all_is_refused(heldout):
    with pytest.raises(UserError, match="between 1 and 26"):
        split_sums(seed=1, max_operand=2, heldout=heldout)
