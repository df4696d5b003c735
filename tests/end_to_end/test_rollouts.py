"""What a user relies on of rollouts in a whole run: engines that fail, groups that are dropped, samples that go on."""

import json
from collections import Counter
from pathlib import Path

import pytest
from run_support import (
    ONE_RANK,
    TWO_ENGINES,
    TinyInputs,
    arguments,
    engine_counts,
    leaves_no_process,
    metrics,
    run,
    samples,
)

pytestmark = pytest.mark.slow

BOUND_S = 300.0
"""For a step in which both engines are lost: a second between two checks, ten for an answer, then a start, all of it on
cores that others want, too."""


def test_one_engine_stopped_and_one_killed_in_mid_rollout_and_an_owner_killed_change_nothing(
    inputs: TinyInputs, uninterrupted: Path, tmp_path: Path
) -> None:
    """Two requests are under way at a time, and the last are still to be sent. As on GPUs that they share with the
    trainer, the engines give their memory back while it trains. In fp32 and with equal weights the engines take every
    token where the trainer would, so that replaying them changes nothing either."""
    more = (
        "--use-rollout-routing-replay "
        "--colocate --rollout-max-concurrency 2 --rollout-health-check-interval 1 --rollout-health-check-timeout 5"
    )
    command = arguments(inputs, tmp_path, "struck", *TWO_ENGINES, *more.split())
    command[command.index("recipe.train")] = "struck_rollout"
    with leaves_no_process(str(tmp_path)):
        status, output = run(command)
    assert status == 0, output
    lines, expected = metrics(tmp_path / "struck"), metrics(uninterrupted)
    assert [line.pop("routing_disagreement", None) for line in lines] == [None, *[0.0] * (len(lines) - 1)]
    struck, bereft = (line for line in lines if line.get("engine_restarts"))
    assert (struck["step"], bereft["step"]) == (3, 5)
    assert (struck["engine_restarts"], bereft["engine_restarts"]) == (2, 1)
    assert struck["request_retries"] > 0
    assert struck["retried_tokens"] > 0
    engine_counts(lines)
    assert set(engine_counts(expected).values()) == {0}
    assert lines == expected
    assert samples(tmp_path / "struck") == samples(uninterrupted)
    steps = [json.loads(line) for line in (tmp_path / "struck" / "metrics.jsonl").read_text().splitlines()]
    assert steps[3]["seconds_rollout"] < BOUND_S


def test_one_engine_stopped_and_one_killed_while_weights_are_sent_change_nothing(
    inputs: TinyInputs, uninterrupted: Path, tmp_path: Path
) -> None:
    more = "--num-rollout 3 --update-weight-timeout 10 --update-weight-transfer distributed"
    command = arguments(inputs, tmp_path, "struck", *TWO_ENGINES, *more.split())
    command[command.index("recipe.train")] = "struck_update"
    with leaves_no_process(str(tmp_path)):
        status, output = run(command)
    assert status == 0, output
    assert "failed while it was sent weights" in output
    lines, expected = metrics(tmp_path / "struck"), metrics(uninterrupted)[:4]
    assert [line.get("engine_restarts", 0) for line in lines] == [0, 0, 2, 0]
    engine_counts(lines)
    engine_counts(expected)
    assert lines == expected
    assert samples(tmp_path / "struck") == samples(uninterrupted)[: 3 * 16]
    steps = [json.loads(line) for line in (tmp_path / "struck" / "metrics.jsonl").read_text().splitlines()]
    assert steps[2]["seconds_update_weights"] < BOUND_S


def test_a_run_drops_groups_and_takes_two_steps_a_rollout(inputs: TinyInputs, tmp_path: Path) -> None:
    """With a KL term: each rollout takes the passes of the old and of the reference model. `test_synchronous_loop`
    resumes a run that drops groups, `test_resume` one of two steps a rollout."""
    command = arguments(inputs, tmp_path, "filtered", "--skip-eval-before-train", *ONE_RANK)
    more = (
        "--num-rollout 3 --n-samples-per-prompt 2 --custom-rm-path run_support:parity_reward "
        "--dynamic-sampling-filter-path check_reward_nonzero_std "
        "--use-kl-loss --kl-loss-coef 0.1 --global-batch-size 4 --use-tis"
    )
    command += more.split()
    status, output = run(command)
    assert status == 0, output
    assert "the reference model is not run" not in output
    assert "no old-log-prob pass" not in output
    lines, made = metrics(tmp_path / "filtered"), samples(tmp_path / "filtered")
    assert lines[0]["logprob_diff_mean"] < 1e-4
    assert 0 < lines[0]["kl"] < lines[-1]["kl"]
    assert sum(line.get("dropped_groups", 0) for line in lines) > 0
    rewards: dict[int, set[float]] = {}
    for sample in made:
        rewards.setdefault(sample["group_index"], set()).add(sample["reward"])
    assert list(rewards.values()) == [{0.0, 1.0}] * 12


def test_aborted_samples_go_on_in_the_next_rollout_and_are_in_checkpoints(inputs: TinyInputs, tmp_path: Path) -> None:
    """`test_synchronous_loop` and `test_collect` go on from such checkpoints."""
    runs = (partial_run(inputs, tmp_path, name) for name in ("first", "second", "third"))
    directory = next(filter(has_a_cut_sample, runs))
    [first, *lines], made = metrics(directory), samples(directory)
    assert any(line["stale_token_share"] > 0 for line in lines)
    assert first["routing_disagreement"] == 0 < max(line["routing_disagreement"] for line in lines) < 1
    assert set(Counter(sample["index"] for sample in made).values()) == {1}
    waiting = {step: waiting_groups(directory / "checkpoints", step) for step in (1, 2, 3)}
    some: set[int] = set()
    for step, groups in waiting.items():
        gone_on = {one["group_index"] for one in made if one["weight_versions"][0] < step <= one["weight_versions"][-1]}
        assert gone_on <= groups
        some |= gone_on
    assert some


def partial_run(inputs: TinyInputs, runs: Path, name: str) -> Path:
    """The directory of a run in which samples that are under way at a rollout's end go on in the next."""
    command = arguments(inputs, runs, name, "--skip-eval-before-train", "--save-interval", "1", *ONE_RANK)
    more = (
        "--num-rollout 4 --rollout-max-response-len 40 --rollout-max-concurrency 3 --save-keep 4 "
        "--over-sampling-batch-size 8 --partial-rollout --use-tis --use-rollout-routing-replay"
    )
    status, output = run(command + more.split())
    assert status == 0, output
    return runs / name


def has_a_cut_sample(directory: Path) -> bool:
    """On a machine that is busy elsewhere the engine may have finished all of them before it is told to stop."""
    return any(len(sample["weight_versions"]) > 1 for sample in samples(directory))


def waiting_groups(folder: Path, step: int) -> set[int]:
    """The groups that wait in a checkpoint."""
    [progress] = (folder / f"iter_{step:07}").glob("*progress*")
    return {group["index"] for group in json.loads(progress.read_text())["waiting"]}
