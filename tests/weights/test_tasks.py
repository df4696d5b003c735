"""The invoke tasks, as docs/weights.md and docs/plan.md show them."""

import os
import subprocess
import sys
from pathlib import Path

from conversion_support import WEIGHTS, assert_same_bits, tensors_of
from safetensors.torch import load_file
from trainer_support import random_checkpoint

ROOT = Path(__file__).parents[2]


def invoke(*words: object, **environment: str) -> tuple[int, str]:
    """Runs an invoke task. Exit status, and what it printed."""
    ended = subprocess.run(
        [sys.executable, "-m", "invoke", *map(str, words)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return ended.returncode, ended.stdout + ended.stderr


def test_convert_and_export(tmp_path: Path) -> None:
    convert = ("convert", "--hf-checkpoint", random_checkpoint(), "--save", tmp_path / "torch_dist", "--recipe", "tiny")
    status, output = invoke(*convert, "--verify", "--processes", 2)
    assert status == 0, output
    assert "of the MTP layer bit for bit" in output
    again, output = invoke(*convert, "--processes", 1)
    assert again == 2
    assert "exists already" in output
    assert "Traceback" not in output
    export = ("export", "--load", tmp_path / "torch_dist", "--hf-checkpoint", random_checkpoint())
    status, output = invoke(*export, "--save", tmp_path / "exported", "--verify", "--processes", 1)
    assert status == 0, output
    assert_same_bits(tensors_of(tmp_path / "exported"), load_file(random_checkpoint() / WEIGHTS))


def test_a_dry_run_prints_the_command_and_does_nothing(tmp_path: Path) -> None:
    words = ("--hf-checkpoint", "DIR", "--save", tmp_path / "out", "--dry-run", "--args", "--mtp-num-layers 1")
    status, output = invoke("convert", *words, "--processes", 8)
    assert status == 0
    assert "--nproc-per-node=8 -m recipe.conversion.convert --recipe glm4.7-flash-8gpu --hf-checkpoint DIR" in output
    assert "--mtp-num-layers 1" in output
    assert not list(tmp_path.iterdir())


def test_a_download_without_a_hub_says_so(tmp_path: Path) -> None:
    status, output = invoke("download", "--base-dir", tmp_path / "data", HF_ENDPOINT="http://127.0.0.1:9")
    assert status == 2
    assert "http://127.0.0.1:9" in output
    assert "Traceback" not in output


def test_a_plan_needs_neither_weights_nor_gpus() -> None:
    words = ("--recipe", "glm4.7-flash-16gpu", "--gpu", "H200-141GB", "--json")
    status, output = invoke("plan", *words, "--dry-run")
    assert status == 0
    assert "-m recipe.plan --recipe glm4.7-flash-16gpu --gpu H200-141GB --host-memory 1TB --price 2.5 --json" in output
    status, output = invoke("plan", *words)
    assert status == 0
    assert '"fits": true' in output
    status, output = invoke("tune", "--gpu", "H200", "--write", "mine.toml", "--dry-run")
    assert status == 0
    assert "-m recipe.plan.tune --recipe glm4.7-flash-8gpu --gpu H200 --host-memory 1TB" in output
    assert "--write mine.toml" in output
    status, output = invoke("tune", "--measure", "--price", "3", "--dry-run")
    assert status == 0
    assert "-m recipe.smoke.measure --recipe glm4.7-flash-8gpu --price 3" in output
