"""The smoke run itself: its command lines, the processes that it starts, and all of it on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from recipe.config import resolve, sglang_rules
from recipe.smoke import process, rates
from recipe.smoke.process import carry_out
from recipe.smoke.projection import read_recipe
from recipe.smoke.settings import GPU_COUNTS, Settings, gpus_to_use
from recipe.system.errors import UserError
from recipe.weights.tiny import KERNEL_SIZES, write_tiny_checkpoint

ROWS = (
    *("GPUs", "driver", "links", "NCCL all-reduce", "bf16 matmul", "GPU memory", "host to GPU and back", "host memory"),
    *("memory", "first token", "weight update", "train/rollout difference", "acceptance length", "learned"),
    *("interruption and resume", "a step of 8gpu-mtp here", "this took"),
)
ON_GPUS_ONLY = (*ROWS[:7], "memory", "acceptance length", "a step of 8gpu-mtp here")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smoke")
    write_tiny_checkpoint(folder / "model", seed=3, changes=KERNEL_SIZES)
    return folder / "model"


def settings_for(gpus: int, checkpoint: Path, *flags: str) -> Settings:
    return Settings(
        checkpoint.parent, gpus, seed=1, warm_up_steps=20, interrupt_after=2, engine="embedded", flags=flags
    )


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_grpo_uses_what_production_uses(gpus: int, checkpoint: Path) -> None:
    config = read_recipe(settings_for(gpus, checkpoint).grpo_flags()).config
    assert config.cluster.colocate
    assert config.model.bf16
    assert config.rollout.engine == "sglang"
    assert config.num_engines == 1
    assert config.perf.expert_model_parallel_size == config.world_size == gpus
    assert config.optimizer.optimizer_cpu_offload
    assert config.optimizer.overlap_cpu_optimizer_d2h_h2d
    assert config.mtp.enable_mtp_training
    assert config.grpo.use_tis
    assert config.checkpoint.async_save
    assert config.rollout.check_weight_update_equal
    assert config.rollout.update_weight_transfer == "tensor"
    assert config.eval.eval_interval is not None
    words = " ".join(config.sglang.command_line())
    assert "--speculative-algorithm EAGLE" in words
    for argument in (f"--ep-size {gpus}", f"--dp-size {gpus}"):
        assert argument in words
    for switch in ("--enable-dp-attention", "--enable-dp-lm-head"):
        assert (switch in words) == (gpus > 1)


def test_the_runs_of_all_sizes_are_valid(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)
    for gpus in (0, *GPU_COUNTS):
        settings = settings_for(gpus, checkpoint, "--num-rollout", "7")
        given = "--hf-checkpoint", str(checkpoint)
        warm_up = resolve([*settings.warm_up_flags(), *given]).config
        grpo = resolve([*settings.grpo_flags(), *given]).config
        assert warm_up.is_sft
        assert not warm_up.needs_engine
        assert warm_up.model.bf16 == grpo.model.bf16 == bool(gpus)
        assert grpo.rollout.num_rollout == 7
        assert grpo.cluster.device == ("auto" if gpus else "cpu")


def test_gpus_over_which_the_experts_spread() -> None:
    assert [gpus_to_use(None, here) for here in (0, 1, 2, 3, 7, 8)] == [0, 1, 2, 2, 4, 8]
    assert gpus_to_use(2, 8) == 2
    with pytest.raises(UserError, match=r"--num-gpus 3: .* 1, 2, 4 or 8 GPUs, and this machine has 8"):
        gpus_to_use(3, 8)


def test_a_commands_output_is_shown_kept_and_ends_with_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "import sys; print('step 1'); print('error: no such flag', file=sys.stderr); print('bye'); sys.exit(2)"
    ended = carry_out("a step", [sys.executable, "-c", script], lambda _: None, tmp_path / "log")
    assert (ended.status, ended.last_words) == (2, "no such flag")
    assert "== a step\n" in (shown := capsys.readouterr().out)
    assert "step 1\n" in shown
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["bye", "error: no such flag", "step 1"]


def test_a_command_does_not_outlive_the_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_GRACE_S", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up'); time.sleep(3600)"
    seen: list[subprocess.Popen[str]] = []

    def leave(started: subprocess.Popen[str]) -> None:
        seen.append(started)
        if (tmp_path / "log").exists() and (tmp_path / "log").stat().st_size:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out("a step", [sys.executable, "-c", deaf], leave, tmp_path / "log")
    assert not psutil.pid_exists(seen[0].pid)
    monkeypatch.setattr(process, "OVERDUE_S", 0.2)
    with pytest.raises(UserError, match="a step has not ended in"):
        carry_out("a step", [sys.executable, "-c", deaf], lambda _: None, tmp_path / "log")


def test_a_hosts_rate_is_of_the_bytes_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "HOST_ELEMENTS", 1 << 20)
    assert 1e8 < rates.measure(0).host_memory < 1e13
    assert rates.measure(0).matmul is None


@pytest.mark.slow
def test_a_cpu_does_all_steps_and_says_that_too_few_do_not_learn(tmp_path: Path) -> None:
    words = f"--device cpu --runs-dir {tmp_path} --price 3 --warm-up-steps 2 --interrupt-after 1"
    few = "--num-rollout 3 --rollout-batch-size 8 --eval-interval 3 --n-samples-per-eval-prompt 1 --rollout-num-gpus 1"
    command = [sys.executable, "-m", "recipe.smoke", *words.split(), *few.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    directory = tmp_path / "smoke"
    document = json.loads((directory / "smoke.json").read_text())
    table, text = document["table"], (directory / "smoke.txt").read_text()
    assert ended.stdout.endswith(text)
    assert tuple(table) == ROWS
    assert {what for what, value in table.items() if value == "not on a CPU"} == set(ON_GPUS_ONLY)
    assert "not measured" not in table.values()
    assert all(f"  {what}" in text for what in ROWS)
    only = "it did not learn: held-out 0.00 before and 0.00 after 3 steps, below 0.9"
    assert document["verdict"] == f"this node is not good: because {only}"
    assert not document["good"]
    interruption = document["measured"]["interruption"]
    assert (interruption["status"], interruption["resumed_status"], interruption["goes_on"]) == (75, 0, True)
    # In fp32 the embedded engine and the trainer compute the same.
    assert document["measured"]["learning"]["logprob_diff_mean"] < 1e-4
    lines = (directory / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
