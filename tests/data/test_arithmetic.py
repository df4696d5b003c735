import json
import subprocess
import sys

import pytest

from recipe.data.arithmetic import split_sums, write_task
from recipe.errors import UserError
from recipe.rewards import REWARD_RULES, Grader, GradeRequest, RewardType


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_sum_is_there_once_and_none_is_on_both_sides_either_way_round():
    train, held = split_sums(seed=1, max_operand=20, heldout=64)
    assert len(held) == 64
    assert len(set(train + held)) == len(train) + len(held) == 21**2
    seen = {frozenset((item.left, item.right)) for item in train}
    assert not any(frozenset((item.left, item.right)) in seen for item in held)


@pytest.mark.parametrize("heldout", [1, 2, 7, 8])
def test_any_number_can_be_held_out(heldout):
    assert len(split_sums(seed=3, max_operand=2, heldout=heldout)[1]) == heldout


def test_the_seed_decides_everything(tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        write_task(tmp_path / name, seed, max_operand=9, heldout=16)
    first, second, other = ((tmp_path / name / "train.jsonl").read_bytes() for name in "abc")
    assert first == second != other


def test_the_given_responses_are_right_answers(tmp_path):
    write_task(tmp_path, 1, max_operand=9, heldout=16)
    train = lines(tmp_path / "train.jsonl")
    requests = [GradeRequest("", line["response"], line["label"]) for line in train]
    with Grader(REWARD_RULES[RewardType.DEEPSCALER]) as grader:
        assert {grade.reward for grade in grader.grade(requests)} == {1.0}
    for line in train:
        left, right = line["prompt"][0]["content"].rstrip("=").split("+")
        assert int(line["label"]) == int(left) + int(right)


def test_the_command_writes_both_files(tmp_path):
    command = [sys.executable, "-m", "recipe.data.arithmetic", "--output", str(tmp_path / "new"), "--seed", "7"]
    subprocess.run(command, check=True)
    train, held = lines(tmp_path / "new/train.jsonl"), lines(tmp_path / "new/heldout.jsonl")
    assert (len(train), len(held)) == (51**2 - 256, 256)
    assert train[0].keys() == {"prompt", "label", "response"}
    assert held[0].keys() == {"prompt", "label"}
    assert held[0]["prompt"][0]["role"] == "user"


@pytest.mark.parametrize("heldout", [0, 9])
def test_holding_out_nothing_or_all_is_refused(heldout):
    with pytest.raises(UserError, match="between 1 and 8"):
        split_sums(seed=1, max_operand=2, heldout=heldout)
