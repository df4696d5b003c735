"""What a user relies on of a whole run: it repeats, it goes on, it ends cleanly."""

import itertools
import json
import os
import signal
from pathlib import Path

import jsonschema
import psutil
import pytest
from run_support import (
    ONE_RANK,
    ROLLOUTS,
    TinyInputs,
    arguments,
    environment_of,
    family,
    finish,
    first_of,
    kill_hard,
    leaves_no_process,
    leaves_nothing,
    lives,
    metrics,
    run,
    samples,
    start,
    wait_for_step,
    wait_until,
)

from recipe.run.journal import Journal
from recipe.run.metrics import schema
from recipe.system.scratch import TMPDIR
from recipe.system.shutdown import SAVED_STATUS
from recipe.weights.checkpoints import latest

pytestmark = pytest.mark.slow


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    for name in ("manifest.json", "metrics.jsonl", "summary.json", "reward.png"):
        assert (uninterrupted / name).stat().st_size > 0
    for line in metrics_with_times(uninterrupted):
        jsonschema.validate(line, schema())
    assert_training_is_in_its_parts(metrics_with_times(uninterrupted))
    assert list((uninterrupted / "tensorboard").glob("events*"))
    assert (uninterrupted / "checkpoints" / f"iter_{ROLLOUTS:07d}").is_dir()
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["steps"] == ROLLOUTS
    assert 0 <= summary["eval"]["before"] <= 1
    assert_start_adds_up(summary)
    [memory] = json.loads((uninterrupted / "host_memory.json").read_text())
    # Each of the two ranks has the gradients of all parameters, and both moments of half of them.
    assert memory["optimizer state"] == pytest.approx(memory["gradients"], rel=0.01)
    assert memory["weights"] >= memory["gradients"]
    assert memory["reference model"] == 0
    assert memory["total"] == sum(memory.values()) - memory["total"]


def metrics_with_times(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_training_is_in_its_parts(lines: list[dict]) -> None:
    """Nearly all of it: the driver waits for little else, in a step at least that nobody disturbed."""
    steps = [line for line in lines if line["step"]]
    parts = [step["seconds_forward_backward"] + step["seconds_optimizer"] for step in steps]
    assert all(part < step["seconds_train"] for part, step in zip(parts, steps, strict=True))
    assert any(part > 0.3 * step["seconds_train"] for part, step in zip(parts, steps, strict=True))


def assert_start_adds_up(summary: dict) -> None:
    """Ranks and engines start at the same time; nothing of either is missing or counted twice."""
    start = summary["start"]
    within = {name: start[f"ranks_{name}"] for name in ("imports", "groups", "model", "weights", "optimizer")}
    assert min(start.values()) > 0
    assert max(within.values()) < start["ranks"]
    assert start["data"] < start["ranks"]
    first_weights = start["command"] + start["ray"] + max(start["ranks"], start["engines"]) + start["first_weights"]
    assert first_weights <= start["to_first_weights"] < start["to_first_answer"] < summary["wall_s"]


def test_trainer_and_engine_agree_before_the_first_step(uninterrupted: Path) -> None:
    first = metrics(uninterrupted)[1]
    assert first["logprob_diff_mean"] < 1e-4
    assert abs(first["logprob_kl"]) < 1e-6
    assert first["logprob_beyond_2"] == first["logprob_beyond_10"] == 0.0
    assert first["clip_share"] == 0.0


def test_every_sample_is_made_once_under_the_weights_of_its_step(uninterrupted: Path) -> None:
    found = samples(uninterrupted)
    assert [sample["index"] for sample in found] == list(range(ROLLOUTS * 16))
    for sample in found:
        assert sample["weight_versions"] == [sample["index"] // 16]


NOTHING_LEFT_S = 60.0
"""After a SIGKILL: four times what docs/guarantees.md promises, for tests share their cores with one another."""


def scratch_of(processes: list[psutil.Process]) -> Path:
    """The folder in which the run's processes have their temporary files, sockets and Ray's logs."""
    environments, ours = [environment_of(one) for one in processes], os.environ.get(TMPDIR)
    [folder] = {Path(one[TMPDIR]) for one in environments if one.get(TMPDIR, ours) != ours}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name.partition("-")[0] for path in folder.iterdir()} >= {"engine", "ray", "token", "torch"}
    return folder


HELD = ("--custom-rm-path", "run_support:held_reward", "--rm-timeout-s", "3600")
"""In mid rollout for as long as it takes."""
HELPERS = ("dashboard/dashboard.py", "log_monitor.py")
"""Processes of Ray's that a run goes on without."""


def test_a_run_killed_resumed_given_notice_and_resumed_again_equals_the_uninterrupted_one(
    inputs: TinyInputs, uninterrupted: Path, tmp_path: Path
) -> None:
    """In mid rollout both times: no reward comes any more."""
    directory, command = tmp_path / "killed", arguments(inputs, tmp_path, "killed")
    evaluation, rollout = 8 * 4, 16
    with leaves_no_process(str(tmp_path)):
        process = start([*command, *HELD], REWARDS_GIVEN=str(2 * evaluation + 3 * rollout))
        wait_for_step(process, directory, 3)
        processes = family(process)
        scratch = scratch_of(processes)
        kill_hard(process)
        wait_until(lambda: not any(lives(one) for one in processes) and not scratch.exists(), NOTHING_LEFT_S)
    assert metrics(directory)[-1]["step"] == 3
    going_on = [*command, "--load", str(directory / "checkpoints"), "--save-interval", "1000"]
    give_notice_after_a_step([*going_on, *HELD], directory, rewards=rollout + evaluation)
    assert json.loads((directory / "summary.json").read_text())["outcome"] == "interrupted"
    newest = latest(directory / "checkpoints")
    assert newest is not None
    assert newest.name == "iter_0000003"
    assert metrics(directory)[-1]["step"] == 3
    status, output = run(going_on)
    assert status == 0, output
    assert metrics(directory) == metrics(uninterrupted)
    assert samples(directory) == samples(uninterrupted)
    for name in ("samples.jsonl", "evals.jsonl"):
        assert Journal(directory / name).read() == Journal(uninterrupted / name).read()
    conditions = Journal(directory / "conditions.jsonl").read()
    assert [line["step"] for line in conditions] == list(range(ROLLOUTS + 1))
    tokens = [
        {path.name: path.read_text() for path in (one / "tokens").iterdir()} for one in (directory, uninterrupted)
    ]
    assert tokens[0] == tokens[1] != {}
    assert_start_adds_up(json.loads((directory / "summary.json").read_text()))


def give_notice_after_a_step(command: list[str], directory: Path, rewards: int) -> None:
    """Starts the run, which loses what it can do without and then gets the notice, and ends saved."""
    with leaves_nothing(str(directory)) as take_note:
        process = start(command, REWARDS_GIVEN=str(rewards))
        assert process.stdout is not None
        said = list(itertools.takewhile(lambda line: not line.startswith("step "), process.stdout))
        assert process.poll() is None, said
        processes = take_note(process)
        for helper in HELPERS:
            first_of(processes, helper).kill()
        os.killpg(process.pid, signal.SIGHUP)  # as a terminal that is closed; `timeout` and Slurm send SIGTERM so
        status, output = finish(process)
    assert status == SAVED_STATUS, output
    assert "SIGHUP received: saving what is done" in output
    assert "Traceback" not in output


def test_supervised_steps_lower_the_loss_and_export_what_they_learned(inputs: TinyInputs, tmp_path: Path) -> None:
    exported = tmp_path / "exported-{rollout_id}"
    command = arguments(inputs, tmp_path, "sft", "--loss-type", "sft", "--eval-prompt-data", "none")
    more = ("--n-samples-per-prompt", "1", "--prompt-data", str(inputs.warmup), "--save-hf", str(exported), *ONE_RANK)
    status, output = run([*command, *more])
    assert status == 0, output
    losses = [line["loss"] for line in metrics(tmp_path / "sft")]
    assert losses[-1] < losses[0]
    assert {folder.name for folder in tmp_path.glob("exported-*")} == {f"exported-{n}" for n in (2, 4, ROLLOUTS)}
    files = {file.name for file in (tmp_path / f"exported-{ROLLOUTS}").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}
