"""Advice: each rule speaks of a run that goes wrong in its way, and not of one that does not."""

import re
from pathlib import Path

import pytest

from recipe.run.advice import RULES, WINDOW, Adviser
from recipe.run.conditions import Conditions

ROOT = Path(__file__).parents[2]
CONFIG = {"rollout": {"rollout_max_response_len": 8192, "partial_rollout": False, "dynamic_sampling_filter_path": None}}
GOOD = {
    "reward": 0.5,
    "samples": 256,
    "truncated_share": 0.05,
    "zero_std_share": 0.2,
    "entropy": 0.4,
    "clip_share": 0.01,
    "logprob_diff_mean": 0.012,
    "engine_restarts": 0,
    "grader_failed": 0,
    "skipped_steps": 0,
    "seconds_step": 100.0,
    "seconds_rollout": 60.0,
}
"""A step of a run of which there is nothing to say."""
HEALTHY = Conditions(1, host_memory_used=50, host_memory=100, busy_share=0.7)
EVALUATION = {"eval/aime": 0.5, "eval/aime_ci95_low": 0.45, "eval/aime_ci95_high": 0.55}

SKIPPED_EACH = "one more each step"

WRONG: dict[str, dict] = {
    "truncated": {"truncated_share": 0.99},
    "nothing-to-learn": {"zero_std_share": 0.9},
    "entropy": {"entropy": 0.02},
    "difference": {"logprob_diff_mean": 0.08},
    "idle-engines": {"busy_share": 0.2},
    "host-memory": {"host_memory_used": 95},
    "behind-plan": {"seconds_step": 300.0},
    "grader": {"grader_failed": 20},
    "restarts": {"engine_restarts": 1},
    "skipped": {"skipped_steps": SKIPPED_EACH},
    "clipped": {"clip_share": 0.4},
    "worse": {"eval/aime": 0.3, "eval/aime_ci95_low": 0.25, "eval/aime_ci95_high": 0.35},
}
"""What the later steps of a run are that goes wrong so."""


def advised(wrong: dict, steps: int = 2 * WINDOW) -> tuple[Adviser, list[tuple[int, str]]]:
    """A run of good steps and as many that are `wrong`; the steps after which something new was said."""
    adviser = Adviser(CONFIG, planned_step_s=150.0)
    adviser.take({"step": 0, "seconds_step": 60.0, **EVALUATION}, None)
    said = []
    for step in range(1, 2 * steps + 1):
        change = wrong if step > steps else {}
        if change.get("skipped_steps") == SKIPPED_EACH:
            change = {"skipped_steps": step}
        line = {"step": step, **GOOD, **{name: value for name, value in change.items() if name not in vars(HEALTHY)}}
        conditions = Conditions(**{**vars(HEALTHY), **{k: v for k, v in change.items() if k in vars(HEALTHY)}})
        said += [(step, advice.rule) for advice in adviser.take(line, conditions)]
    return adviser, said


def test_every_rule_has_its_run() -> None:
    assert set(WRONG) == set(RULES)


def test_nothing_is_said_of_a_good_run() -> None:
    assert advised({})[1] == []


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_speaks_once_of_a_run_that_goes_wrong(rule: str) -> None:
    adviser, said = advised(WRONG[rule])
    assert [name for _, name in said] == [rule]
    (standing,) = adviser.standing.values()
    assert (standing.rule, standing.step) == (rule, said[0][0])
    assert re.search(r"--[a-z-]+|make [a-z]+", standing.sentence), "it names something to turn"


@pytest.mark.parametrize("rule", RULES)
def test_what_is_mended_stands_no_more_and_is_told_once_though_it_returns(rule: str) -> None:
    adviser, _ = advised(WRONG[rule])
    for step in range(100, 100 + 2 * WINDOW):
        last = {"skipped_steps": 40} if rule == "skipped" else {}
        adviser.take({"step": step, **GOOD, **EVALUATION, **last}, HEALTHY)
    assert not adviser.standing
    told = []
    for step in range(200, 200 + 2 * WINDOW):
        change = {"skipped_steps": step} if rule == "skipped" else WRONG[rule]
        values = {name: value for name, value in change.items() if name not in vars(HEALTHY)}
        around = {name: value for name, value in change.items() if name in vars(HEALTHY)}
        told += adviser.take({"step": step, **GOOD, **values}, Conditions(**{**vars(HEALTHY), **around}))
    assert told == []
    assert rule in adviser.standing


@pytest.mark.parametrize("rule", RULES)
def test_the_page_that_a_rule_names_is_there(rule: str) -> None:
    page, _, anchor = RULES[rule][1].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert not anchor or anchor in slugs


def test_flags_that_are_named_exist() -> None:
    from recipe.config.flags import FLAGS

    for rule in RULES:
        (standing,) = advised(WRONG[rule])[0].standing.values()
        for flag in re.findall(r"--[a-z-]+", standing.sentence):
            assert flag in FLAGS or flag.startswith("--sglang-") or flag == "--lengths-of", (rule, flag)


@pytest.mark.parametrize(("planned_s", "fine_s", "behind_s"), [(0.2, 5.0, 5.5), (150.0, 187.0, 188.0)])
def test_a_step_is_behind_its_plan_by_a_quarter_and_by_seconds(
    planned_s: float, fine_s: float, behind_s: float
) -> None:
    """A tiny model's takes what nobody plans: kernels and requests that start."""
    adviser = Adviser(CONFIG, planned_step_s=planned_s)
    for step in range(1, 2 * WINDOW):
        assert adviser.take({"step": step, **GOOD, "seconds_step": fine_s}, HEALTHY) == []
    for step in range(2 * WINDOW, 4 * WINDOW):
        adviser.take({"step": step, **GOOD, "seconds_step": behind_s}, HEALTHY)
    assert [advice.rule for advice in adviser.standing.values()] == ["behind-plan"]


def test_too_few_steps_say_nothing() -> None:
    adviser = Adviser(CONFIG, planned_step_s=150.0)
    for step in range(1, WINDOW):
        assert adviser.take({"step": step, **GOOD, "truncated_share": 1.0}, HEALTHY) == []
