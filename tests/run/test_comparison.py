"""Two evaluations compared problem by problem, and what ends a run whose gain is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from recipe.config import MiscConfig
from recipe.messages import Evaluated
from recipe.run.comparison import compare_runs, evaluation_line, gain, obstacles
from recipe.run.journal import Journal
from recipe.run.spending import check_gain
from recipe.run.statistics import mean_difference, paired_difference
from recipe.system.errors import UserError
from recipe.system.shutdown import Stopped

SAMPLES = 4


def scores(mean: float, problems: int = 60, seed: int = 1) -> tuple[float, ...]:
    draw = np.random.default_rng(seed)
    return tuple((draw.binomial(SAMPLES, mean, problems) / SAMPLES).tolist())


def write(run: Path, *evaluations: tuple[int, str, tuple[float, ...]], **settings: object) -> Path:
    """A run with these evaluations: step, set and scores."""
    run.mkdir()
    for step, name, found in evaluations:
        Journal(run / "evals.jsonl").append(evaluation_line(step, name, Evaluated({}, found, SAMPLES)))
    sets = sorted({name for _, name, _ in evaluations})
    config = {
        "eval": {"eval_prompt_data": [[name, f"{name}.jsonl"] for name in sets], **settings},
        "rollout": {"rollout_max_response_len": 100},
    }
    hashes = {f"{name}.jsonl": "hash" for name in sets}
    (run / "manifest.json").write_text(json.dumps({"config": config, "sha256": hashes}))
    return run


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    run = write(tmp_path / "a", (0, "x", scores(0.2)), (20, "x", scores(0.7)))
    (found,) = compare_runs(run, run)
    assert found.difference.estimate.mean == 0
    assert found.difference.p_value == found.difference.p_value_signs == 1
    assert found.steps == (20, 20)


def test_the_newest_evaluations_are_paired_and_swapping_flips_the_sign(tmp_path: Path) -> None:
    left, right = scores(0.7), scores(0.5, seed=2)
    a = write(tmp_path / "a", (0, "x", scores(0.1)), (20, "x", left), (20, "only a", left))
    b = write(tmp_path / "b", (40, "x", right), (40, "only b", right))
    (found,), (swapped,) = compare_runs(a, b), compare_runs(b, a)
    assert found.set == "x"
    assert found.steps == (20, 40)
    assert found.difference == paired_difference(left, right, (SAMPLES, SAMPLES), 0)
    ours, theirs = found.difference.estimate, swapped.difference.estimate
    assert (ours.mean, ours.low, ours.high) == pytest.approx((-theirs.mean, -theirs.high, -theirs.low))
    assert found.difference.p_value == pytest.approx(swapped.difference.p_value)


def test_rewards_beyond_shares_are_compared_too(tmp_path: Path) -> None:
    left, right = (3.0, -1.0, 2.5, 4.0), (1.0, -2.0, 2.5, 1.0)
    a, b = write(tmp_path / "a", (20, "x", left)), write(tmp_path / "b", (20, "x", right))
    (found,) = compare_runs(a, b)
    assert found.difference == mean_difference(left, right, 0)
    assert found.difference.estimate.mean == pytest.approx(1.5)
    assert found.difference.estimate.low < 0 < found.difference.estimate.high


def test_what_cannot_be_compared_is_a_sentence(tmp_path: Path) -> None:
    a = write(tmp_path / "a", (20, "x", scores(0.5)))
    with pytest.raises(UserError, match="had 60 problems at step 20 and 30 at step 20"):
        compare_runs(a, write(tmp_path / "b", (20, "x", scores(0.5, problems=30))))
    with pytest.raises(UserError, match="have no evaluation of one set"):
        compare_runs(a, write(tmp_path / "c", (20, "y", scores(0.5))))


def test_what_keeps_two_runs_from_being_comparable_is_told(tmp_path: Path) -> None:
    a = write(tmp_path / "a", (20, "x", scores(0.5)), n_samples_per_eval_prompt=4)
    b = write(tmp_path / "b", (20, "x", scores(0.5)), n_samples_per_eval_prompt=16)
    assert list(obstacles(a, a)) == []
    manifest = json.loads((b / "manifest.json").read_text())
    manifest["sha256"]["x.jsonl"] = "another"
    (b / "manifest.json").write_text(json.dumps(manifest))
    assert list(obstacles(a, b)) == [
        "--n-samples-per-eval-prompt is 4 in a and 16 in b",
        "the set x is not the same file in both: its hashes differ",
    ]


def test_a_gain_is_the_newest_less_the_first(tmp_path: Path) -> None:
    before, after = scores(0.2), scores(0.6, seed=3)
    run = write(tmp_path / "a", (0, "x", before), (20, "x", scores(0.4, seed=2)), (40, "x", after))
    found = gain(run, "x")
    assert found == paired_difference(after, before, (SAMPLES, SAMPLES), 0).estimate
    assert gain(run, "y") is None
    assert gain(write(tmp_path / "b", (0, "x", before)), "x") is None
    assert gain(write(tmp_path / "c", (20, "x", after)), "x") is None


@pytest.mark.parametrize(
    ("target", "after", "rollouts", "ends"),
    [
        (0.05, None, 20, "--target-gain 0.05 is reached"),
        (0.95, None, 20, None),
        (0.95, 40, 20, None),
        (0.95, 20, 20, "after 20 rollouts (--target-gain-after) --target-gain 0.95 is not reached"),
        (0.4, 20, 20, None),
        (None, None, 20, None),
    ],
)
def test_a_run_ends_when_its_gain_is_known(
    target: float | None, after: int | None, rollouts: int, ends: str | None, tmp_path: Path
) -> None:
    """The gain is 0.4 or so, give or take 0.15."""
    run = write(tmp_path / "a", (0, "x", scores(0.2)), (20, "x", scores(0.6, seed=2)))
    misc = MiscConfig(target_gain=target, target_gain_after=after)
    if ends is None:
        check_gain(misc, run, "x", rollouts)
        return
    with pytest.raises(Stopped) as stopped:
        check_gain(misc, run, "x", rollouts)
    assert ends in stopped.value.why


def test_a_gain_that_cannot_be_judged_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another file under the old name; rewards that all differ alike, which have no spread."""
    other = write(tmp_path / "a", (0, "x", scores(0.2)), (20, "x", scores(0.9, problems=30)))
    check_gain(MiscConfig(), other, "x", 20)
    assert not caplog.records
    check_gain(MiscConfig(target_gain=0.1), other, "x", 20)
    assert "cannot be judged: the set x had 30 problems" in caplog.text
    alike = write(tmp_path / "b", (0, "x", (0.0, 1.0)), (20, "x", (2.0, 3.0)))
    assert gain(alike, "x") is None
    check_gain(MiscConfig(target_gain=0.1), alike, "x", 20)
