"""What a user relies on of a whole run: it repeats, it goes on, it ends cleanly, it keeps its doors shut."""

import http.client
import json
import signal
import socket
import urllib.request
from contextlib import suppress
from pathlib import Path

import jsonschema
import psutil
import pytest
from run_support import (
    ONE_ENGINE,
    ONE_OF_EACH,
    ROLLOUTS,
    TinyInputs,
    arguments,
    engine_counts,
    engines,
    family,
    finish,
    kill_hard,
    leaves_no_process,
    lives,
    metrics,
    run,
    samples,
    start,
    wait_for_step,
    wait_until,
    without_ray,
)

from recipe.run.journal import Journal
from recipe.run.metrics import schema

pytestmark = pytest.mark.slow


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    for name in ("manifest.json", "metrics.jsonl", "summary.json", "reward.png"):
        assert (uninterrupted / name).stat().st_size > 0
    for line in (uninterrupted / "metrics.jsonl").read_text().splitlines():
        jsonschema.validate(step := json.loads(line), schema())
        if step["step"]:  # nearly all of the training is in its parts: the driver waits for little else
            parts = step["seconds_forward_backward"] + step["seconds_optimizer"]
            assert 0.3 * step["seconds_train"] < parts < step["seconds_train"]
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


NOTHING_LEFT_S = 15.0
"""After a SIGKILL: what docs/guarantees.md promises."""


def scratch_of(processes: list[psutil.Process]) -> Path:
    """The folder in which the run's processes have their temporary files, sockets and Ray's logs."""
    [folder] = {Path(one.environ()["TMPDIR"]) for one in processes if "TMPDIR" in one.environ()}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name.partition("-")[0] for path in folder.iterdir()} >= {"engine", "ray", "token", "torch"}
    return folder


def test_a_run_killed_and_resumed_equals_the_uninterrupted_one(
    inputs: TinyInputs, uninterrupted: Path, tmp_path: Path
) -> None:
    command = arguments(inputs, tmp_path, "killed")
    with leaves_no_process(str(tmp_path)):
        process = start(command)
        wait_for_step(process, tmp_path / "killed", 3)
        processes = family(process)
        scratch = scratch_of(processes)
        kill_hard(process)
        wait_until(lambda: not any(lives(one) for one in processes) and not scratch.exists(), NOTHING_LEFT_S)
    assert len(metrics(tmp_path / "killed")) < ROLLOUTS + 1, "the run was over before it was killed"
    status, output = run([*command, "--load", str(tmp_path / "killed" / "checkpoints")])
    assert status == 0, output
    assert metrics(tmp_path / "killed") == metrics(uninterrupted)
    assert samples(tmp_path / "killed") == samples(uninterrupted)
    for name in ("samples.jsonl", "evals.jsonl"):
        assert Journal(tmp_path / "killed" / name).read() == Journal(uninterrupted / name).read()
    conditions = Journal(tmp_path / "killed" / "conditions.jsonl").read()
    assert [line["step"] for line in conditions] == list(range(ROLLOUTS + 1))
    tokens = [
        {path.name: path.read_text() for path in (one / "tokens").iterdir()}
        for one in (tmp_path / "killed", uninterrupted)
    ]
    assert tokens[0] == tokens[1] != {}
    assert_start_adds_up(json.loads((tmp_path / "killed" / "summary.json").read_text()))


@pytest.mark.parametrize("victim", ["server", "owner"])
def test_an_engine_killed_in_mid_run_is_replaced_and_changes_nothing(
    victim: str, inputs: TinyInputs, uninterrupted: Path, tmp_path: Path
) -> None:
    process = start(arguments(inputs, tmp_path, "bereft"))
    wait_for_step(process, tmp_path / "bereft", 2)
    server = engines(psutil.Process(process.pid))[0]
    (server if victim == "server" else server.parent()).kill()
    status, output = finish(process)
    assert status == 0, output
    found = metrics(tmp_path / "bereft")
    assert engine_counts(found)["engine_restarts"] == 1
    expected = metrics(uninterrupted)
    assert set(engine_counts(expected).values()) == {0}
    assert found == expected
    assert samples(tmp_path / "bereft") == samples(uninterrupted)


def listening(processes: list[psutil.Process]) -> dict[str, set[str]]:
    """Addresses that each kind of process listens on."""
    found: dict[str, set[str]] = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    address = f"{connection.laddr.ip}:{connection.laddr.port}"
                    found.setdefault(" ".join(process.cmdline()), set()).add(address)
    return found


def test_doors_are_shut_and_an_interrupt_ends_everything(inputs: TinyInputs, tmp_path: Path) -> None:
    with leaves_no_process(str(tmp_path)):
        process = start(arguments(inputs, tmp_path, "interrupted", "--num-rollout", "1000"))
        wait_for_step(process, tmp_path / "interrupted", 1)
        doors = listening(family(process))
        engine_doors = [doors[name] for name in doors if "recipe.engines.embedded" in name]
        assert len(engine_doors) == 2
        assert all(address.startswith("127.0.0.1:") for of_one in engine_doors for address in of_one)
        ray_heads = [doors[name] for name in doors if "dashboard/dashboard.py" in name]  # none yet, if it is slow
        assert not any(address.startswith("127.0.0.1:") for head in ray_heads for address in head), "a dashboard"
        everywhere = [one for of_one in doors.values() for one in of_one if not one.startswith("127.0.0.1:")]
        assert not [address for address in everywhere if tells_metrics(address.rpartition(":")[2])]
        [gcs] = [doors[name] for name in doors if "gcs_server" in name]
        assert_gcs_refuses_strangers(next(iter(gcs)).split(":")[-1])
        process.send_signal(signal.SIGINT)
        status, output = finish(process, 60)
    assert status == 128 + signal.SIGINT
    assert "Traceback" not in output
    summary = json.loads((tmp_path / "interrupted" / "summary.json").read_text())
    assert summary["outcome"] == "interrupted"


def tells_metrics(port: str) -> bool:
    """Whether anybody who asks is told how the run and its machine do."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return bool(answer.read(100).startswith(b"# HELP"))
    except (OSError, http.client.HTTPException):
        return False


def assert_gcs_refuses_strangers(port: str) -> None:
    import subprocess
    import sys

    program = f"from ray._raylet import GcsClient; GcsClient(address='127.0.0.1:{port}')"
    with socket.create_connection(("127.0.0.1", int(port)), timeout=5):
        stranger = subprocess.run(
            [sys.executable, "-c", program], env=without_ray(), capture_output=True, text=True, timeout=120
        )
    assert stranger.returncode != 0
    assert "AuthenticationError" in stranger.stderr


def test_a_reward_function_that_always_raises_stops_the_run(inputs: TinyInputs, tmp_path: Path) -> None:
    with leaves_no_process(str(tmp_path)):
        command = arguments(inputs, tmp_path, "faulty", "--skip-eval-before-train", *ONE_OF_EACH)
        status, output = run([*command, "--custom-rm-path", "run_support:failing_reward"])
    assert status == 2
    assert "the reward divides by zero" in output
    assert "Traceback" not in output


def test_kl_terms_and_several_steps_a_rollout_run_the_passes_they_need(inputs: TinyInputs, tmp_path: Path) -> None:
    command = arguments(inputs, tmp_path, "kl", "--skip-eval-before-train", "--num-rollout", "3", *ONE_ENGINE)
    more = "--use-kl-loss --kl-loss-coef 0.1 --global-batch-size 8 --use-tis"
    status, output = run([*command, *more.split()])
    assert status == 0, output
    assert "the reference model is not run" not in output
    assert "no old-log-prob pass" not in output
    first, *_, last = metrics(tmp_path / "kl")
    assert first["logprob_diff_mean"] < 1e-4
    assert 0 < first["kl"] < last["kl"]


def test_supervised_steps_lower_the_loss_and_export_what_they_learned(inputs: TinyInputs, tmp_path: Path) -> None:
    exported = tmp_path / "exported-{rollout_id}"
    command = arguments(inputs, tmp_path, "sft", "--loss-type", "sft", "--n-samples-per-prompt", "1")
    status, output = run([*command, "--prompt-data", str(inputs.warmup), "--save-hf", str(exported)])
    assert status == 0, output
    losses = [line["loss"] for line in metrics(tmp_path / "sft")[1:]]
    assert losses[-1] < losses[0]
    assert {folder.name for folder in tmp_path.glob("exported-*")} == {f"exported-{n}" for n in (2, 4, ROLLOUTS)}
    files = {file.name for file in (tmp_path / f"exported-{ROLLOUTS}").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}
