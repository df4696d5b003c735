"""A run that cannot go well here stops before it starts anything."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from trainer_support import random_checkpoint

from recipe.config import Resolved, resolve, sglang_rules
from recipe.messages import TrainSample
from recipe.plan import constants, preflight
from recipe.plan.machine import FoundGpu, FoundMachine, pairs_are_linked, parse_gpus, read_gpus, read_machine
from recipe.plan.memory import longest_sample, object_store_bytes
from recipe.plan.options import PUBLISHED
from recipe.system.errors import UserError

GIB = 2**30
H100 = FoundGpu("NVIDIA H100 80GB HBM3", 81000 << 20, 0, "580.95.05")
RENTED = FoundMachine(
    gpus=(H100,) * 8,
    linked=True,
    host_memory=10**12,
    shared_memory=64 * GIB,
    disk=2 * 10**12,
    open_files=65536,
)
LINKED = """        GPU0    GPU1    NIC0    CPU Affinity    NUMA Affinity
GPU0     X      NV18    PIX     0-95    0
GPU1    NV18     X      SYS     0-95    0
NIC0    PIX     SYS      X
"""


RECIPE = ["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(PUBLISHED)]


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> Resolved:
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return resolve(RECIPE)


def refusal_on(found: FoundMachine, resolved: Resolved, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(preflight, "read_machine", lambda folder: found)
    with pytest.raises(UserError) as refused:
        preflight.preflight(resolved, force=False)
    return str(refused.value)


def test_a_machine_as_it_should_be_passes(eight_gpus: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "read_machine", lambda folder: RENTED)
    plan = preflight.preflight(eight_gpus, force=False)
    assert plan is not None
    assert plan.fits


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpus": (H100,) * 4}, "this machine has 4 GPUs and the run needs 8 of each machine"),
        ({"gpus": (FoundGpu("NVIDIA H100", 40 * GIB, 0, "580.1"),) * 8}, "has 40.0 GiB"),
        ({"gpus": (FoundGpu("NVIDIA H100", 79 * GIB, 0, "550.54.15"),) * 8}, "driver here is 550.54.15 and CUDA 13"),
        ({"gpus": (*(H100,) * 7, FoundGpu("NVIDIA H100", 79 * GIB, 9 * GIB, "580"))}, "GPU 7: up to 9.0 GiB are in us"),
        ({"shared_memory": 64 << 20}, "/dev/shm has 0.07 GB free"),
        ({"open_files": 1024}, "a process may open 1024 files only"),
        ({"host_memory": 3 * 10**11}, "of host memory in resume and has 300 GB"),
        (
            {"disk": 10**12},
            "419 GB and 23 GB of samples need 1,280 GB of disk, and 1,000 GB are free; it does with --s",
        ),
    ],
)
def test_what_is_missing_stops_the_run_in_one_sentence(
    eight_gpus: Resolved, monkeypatch: pytest.MonkeyPatch, changes: dict, sentence: str
) -> None:
    told = refusal_on(FoundMachine(**(vars(RENTED) | changes)), eight_gpus, monkeypatch)
    assert sentence in told
    assert told.endswith("(--force goes on all the same)")
    assert "\n" not in told


@pytest.mark.parametrize(
    ("flags", "gpus", "sentence"),
    [
        (["--fp32", "--attention-backend", "auto"], RENTED.gpus, "--fp32 with SGLang on GPUs: its kernels there have"),
        (["--recipe", "glm4.7-flash-8gpu-eagle"], (), "--sglang-speculative-algorithm EAGLE needs GPUs"),
    ],
)
def test_what_sglang_cannot_do_on_this_kind_of_machine_stops_the_run(
    eight_gpus: Resolved, monkeypatch: pytest.MonkeyPatch, flags: list[str], gpus: tuple[FoundGpu, ...], sentence: str
) -> None:
    resolved = resolve(["--recipe", "glm4.7-flash-8gpu", "--hf-checkpoint", str(PUBLISHED), *flags])
    assert sentence in refusal_on(FoundMachine(**(vars(RENTED) | {"gpus": gpus})), resolved, monkeypatch)


def test_engines_gpus_are_counted_on_every_machine(eight_gpus: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two engines of 16 GPUs of their own beside a trainer of 16: 16 more on each of the two machines."""
    recipe = ["--recipe", "glm4.7-flash-16gpu", "--hf-checkpoint", str(PUBLISHED), "--no-colocate"]
    apart = resolve([*recipe, "--rollout-num-gpus", "32", "--rollout-num-gpus-per-engine", "16"])
    told = refusal_on(RENTED, apart, monkeypatch)
    assert "has 8 GPUs and the run needs 24 of each machine, 16 of them for engines: lower" in told
    monkeypatch.setenv("RAY_ADDRESS", "a cluster of these two")
    assert "needs 24 of each machine" in refusal_on(RENTED, apart, monkeypatch)


def test_force_tells_and_goes_on(
    eight_gpus: Resolved, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = FoundMachine(**(vars(RENTED) | {"open_files": 1024, "linked": False}))
    monkeypatch.setattr(preflight, "read_machine", lambda folder: found)
    with caplog.at_level(logging.WARNING):
        preflight.preflight(eight_gpus, force=True)
    assert "a process may open 1024 files only" in caplog.text
    assert "not all joined by NVLink" in caplog.text


def test_missing_nvlink_is_told_and_stops_nothing(
    eight_gpus: Resolved, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, "read_machine", lambda folder: FoundMachine(**(vars(RENTED) | {"linked": False})))
    with caplog.at_level(logging.WARNING):
        preflight.preflight(eight_gpus, force=False)
    assert "not all joined by NVLink" in caplog.text


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    line = "NVIDIA H100 80GB HBM3, 81559, 551, 4, 580.95.05"
    command.write_text(
        f"#!/bin/sh\ncase $1 in *=uuid) printf 'GPU-ab1\\nGPU-ac2\\n';; --query*) printf '{line}\\n{line}\\n';; "
        f"*) cat <<'END'\n{LINKED}END\n;; esac\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = read_machine(tmp_path / "not" / "there" / "yet")
    expected = FoundGpu("NVIDIA H100 80GB HBM3", (81559 - 551) << 20, 4 << 20, "580.95.05")
    assert found.gpus == (expected, expected)
    assert found.linked
    assert expected.described().flops == 989e12
    assert found.disk > 0
    assert min(found.host_memory, found.open_files) > 0
    for visible, count in {"1": 1, "1,0": 2, "": 0, "-1": 0, "GPU-ac": 1, "GPU-a": 2, "MIG-1": 2, "7": 2}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert len(read_gpus()) == count


def test_fields_that_a_driver_does_not_know_count_as_nothing() -> None:
    [found] = parse_gpus("NVIDIA A100-SXM4-40GB, 40960, [N/A], 0, 470.82\n")
    assert found.memory == 40960 << 20


def test_pairs_without_nvlink_are_found() -> None:
    assert pairs_are_linked(LINKED)
    assert not pairs_are_linked(LINKED.replace("NV18", "SYS", 1))


def test_a_driver_that_does_not_answer_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert read_machine(tmp_path).gpus == ()


def test_the_tiny_run_passes_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    flags = ["--recipe", "tiny", "--hf-checkpoint", str(random_checkpoint()), "--runs-dir", str(tmp_path)]
    with caplog.at_level(logging.WARNING):
        preflight.preflight(resolve(flags), force=False)
    assert caplog.text == ""


def test_training_stops_before_it_starts_anything(tmp_path: Path) -> None:
    """A disk that is too small for the checkpoints: no run directory, no Ray, one sentence."""
    flags = ["--recipe", "tiny", "--hf-checkpoint", str(random_checkpoint()), "--runs-dir", str(tmp_path / "runs")]
    flags += ["--save-interval", "1", "--num-rollout", "1000000", "--save-keep", "999999"]
    flags += ["--rollout-max-response-len", "2"]
    ended = subprocess.run(
        [sys.executable, "-m", "recipe.train", *flags], capture_output=True, text=True, timeout=900, check=False
    )
    assert ended.returncode == 2
    assert "It does not fit" in ended.stderr
    assert "--save-keep 3" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "runs").exists()


def test_a_colocated_engine_is_told_the_cache_that_the_plan_counts(
    eight_gpus: Resolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest GPU of the machine decides, and what the user limits is not exceeded."""
    smaller = FoundMachine(
        **(vars(RENTED) | {"gpus": (*RENTED.gpus[1:], FoundGpu(H100.name, 76 * GIB, 0, H100.driver))})
    )
    monkeypatch.setattr(preflight, "read_machine", lambda folder: smaller)
    plan = preflight.plan_here(eight_gpus, smaller)
    assert plan.gpu is not None
    assert plan.gpu.engine is not None
    tokens = preflight.colocated_cache_tokens(eight_gpus)
    assert tokens == plan.gpu.engine.tokens > plan.gpu.engine.needed_tokens
    limited = resolve([*RECIPE, "--sglang-max-total-tokens", "1000"])
    assert preflight.colocated_cache_tokens(limited) == 1000


@pytest.mark.parametrize("flags", [[], ["--use-rollout-routing-replay"], ["--rollout-batch-size", "64"]])
def test_the_object_store_holds_a_rollout_of_the_longest_samples(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they go to the ranks: pickled, with all that a sample may have."""
    monkeypatch.setattr(sglang_rules, "find_sglang_python", lambda named: None)
    monkeypatch.setattr(constants, "LEAST_OBJECT_STORE", 0)
    resolved = resolve([*RECIPE, *flags])
    a, length = resolved.architecture, longest_sample(resolved)
    routing = np.zeros((length - 1, sum(a.moe_layer_freq), a.num_experts_per_tok), np.uint8)
    floats = [np.zeros(length, np.float32) for _ in range(4)]
    sample = TrainSample(
        index=0,
        tokens=np.zeros(length, np.int64),
        loss_mask=np.ones(length, np.bool_),
        advantages=floats[0],
        rollout_log_probs=floats[1],
        sources=np.zeros(length, np.int64),
        old_log_probs=floats[2],
        ref_log_probs=floats[3],
        routed_experts=routing if resolved.config.grpo.replays_routing else None,
    )
    total = len(pickle.dumps(sample)) * resolved.config.samples_per_rollout
    assert total < object_store_bytes(resolved) < 1.5 * total
