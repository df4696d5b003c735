"""Which groups are worth learning from: the built-in filter, and the user's own."""

import sys
from pathlib import Path

import numpy as np
import pytest
from rollout_support import make_prompt

from recipe.rewards import Grade
from recipe.rewards.grader import GradeStatus
from recipe.rollout.filters import load_filter
from recipe.sampling.sample import SampleGroup
from recipe.system.errors import UserError


def graded(*rewards: float) -> SampleGroup:
    group = SampleGroup.of(make_prompt(0, (1,)), 0, len(rewards))
    for sample, reward in zip(group.samples, rewards, strict=True):
        sample.grade = Grade(reward, GradeStatus.GRADED, None, "")
    return group


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [((0.0, 0.0, 1.0), True), ((0.1, 0.2), True), ((1.0, 1.0, 1.0), False), ((-1.0, -1.0), False), ((0.0,), False)],
)
def test_groups_whose_rewards_differ_are_kept(rewards: tuple[float, ...], kept: bool) -> None:
    assert load_filter("check_reward_nonzero_std")(graded(*rewards)) is kept


def mostly_wrong(group: SampleGroup) -> bool:
    return sum(sample.reward or 0.0 for sample in group.samples) < len(group.samples) / 2


def broken(group: SampleGroup) -> bool:
    raise ZeroDivisionError("by zero")


def leaving(group: SampleGroup) -> bool:
    sys.exit(3)


def numpys(group: SampleGroup) -> object:
    return np.mean([sample.reward or 0.0 for sample in group.samples]) < 0.5


def undecided(group: SampleGroup) -> None:
    return None


@pytest.mark.parametrize("name", ["mostly_wrong", "numpys"])
def test_a_function_of_the_users_own_decides(name: str) -> None:
    keep = load_filter(f"test_filters:{name}")
    assert keep(graded(0.0, 0.0, 1.0))
    assert not keep(graded(1.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("no_module_of_this_name:keep", "the module cannot be imported"),
        ("test_filters:nothing", "test_filters has no function nothing"),
    ],
)
def test_a_filter_that_is_not_there_is_refused_at_once(path: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"--dynamic-sampling-filter-path {path}: {sentence}"):
        load_filter(path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("broken", "failed: ZeroDivisionError: by zero"),
        ("leaving", "failed: SystemExit: 3"),
        ("undecided", "returned None; it must return True"),
    ],
)
def test_a_filter_with_a_fault_is_named(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=f"--dynamic-sampling-filter-path test_filters:{name} {sentence}"):
        load_filter(f"test_filters:{name}")(graded(1.0, 0.0))


def test_a_module_that_exits_at_its_import_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exits_at_import.py").write_text("raise SystemExit(4)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"exits_at_import:keep: the module cannot be imported \(SystemExit\(4\)\)"):
        load_filter("exits_at_import:keep")
