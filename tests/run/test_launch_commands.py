"""The commands of the rented-node path, printed and not run, and the launch scripts' flags."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from config_support import GLM_4_7_FLASH

ROOT = Path(__file__).parents[2]
PAGES = "".join((ROOT / page).read_text() for page in ("README.md", "docs/gpu-node.md", "docs/several-nodes.md"))
SCRIPTS = ("run-glm4.7-30B-A3B-8gpus.sh", "run-glm4.7-30B-A3B.sh")
TARGETS = {
    "image": "docker build",
    "train-8gpu": "scripts/run-glm4.7-30B-A3B-8gpus.sh",
    "train-8gpu-mtp": "--recipe glm4.7-flash-8gpu-mtp",
    "train-16gpu": "--recipe glm4.7-flash-16gpu",
    "train-24gpu": "--recipe glm4.7-flash-24gpu",
    "join": "-m recipe.cluster.join",
    "convert": "-m recipe.conversion.convert --recipe glm4.7-flash-8gpu-mtp --hf-checkpoint",
    "export": "-m recipe.conversion.export --load runs/tiny/checkpoints",
    "smoke": "-m recipe.smoke --device auto --engine embedded --price 2.5",
    "report": "-m recipe.run.report runs/tiny",
    "bench": "scripts/bench_trainer.py",
}


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_dry_run_prints_the_command_and_stops(target: str) -> None:
    make = command(
        "make", "--no-print-directory", "-o", "install", target, "DRY_RUN=1", f"BIN={Path(sys.executable).parent}"
    )
    assert make.returncode == 0, make.stderr
    assert TARGETS[target] in make.stdout
    assert make.stdout.startswith("+ ")
    assert "Traceback" not in make.stderr


@pytest.mark.parametrize("line", re.findall(r"^make \S+ BASE_DIR=[^#\n]*", PAGES, re.MULTILINE))
def test_the_commands_of_the_rented_node_parse(line: str) -> None:
    if line.startswith("make download"):
        pytest.skip("asks the hub even when it only prints; test_tasks runs it")
    words = [
        "make",
        "--no-print-directory",
        "-o",
        "install",
        "DRY_RUN=1",
        f"BIN={Path(sys.executable).parent}",
        *shlex.split(line)[1:],
    ]
    printed = command(*words)
    assert printed.returncode == 0, printed.stderr
    base_dir = shlex.split(line)[2].partition("=")[2]
    assert printed.stdout.startswith("+ ")
    assert base_dir in printed.stdout or "--env BASE_DIR" in printed.stdout


def test_gpus_memory_mounts_and_tokens_of_a_gpu_target(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    words = [sys.executable, "-m", "invoke", "train-16gpu", "--dry-run", "--base-dir", str(tmp_path / "data")]
    ended = command(*words, "--args", "--num-rollout 3", HF_TOKEN="hf_secret", WANDB_API_KEY="wandb_secret")
    assert ended.returncode == 0, ended.stderr
    assert "_secret" not in ended.stdout
    line = shlex.split(ended.stdout)
    assert line[-2:] == ["--num-rollout", "3"]
    for expected in ("--gpus all", "--network host", "--ulimit memlock=-1", "--env HF_TOKEN", "--env WANDB_API_KEY"):
        assert expected in ended.stdout
    assert f"source={tmp_path / 'data'},target={tmp_path / 'data'}" in ended.stdout
    assert f"source={ROOT / 'runs'},target=/workspace/runs" in ended.stdout


def test_the_build_context_is_the_same_whoever_checks_out_and_when() -> None:
    from recipe.container.build import Build

    before = Build().context()
    readme = ROOT / "README.md"
    state = readme.stat()
    os.utime(readme, (0, 0))
    try:
        assert Build().context() == before
    finally:
        os.utime(readme, (state.st_atime, state.st_mtime))
    with tarfile.open(fileobj=io.BytesIO(before)) as tar:
        names = tar.getnames()
    assert {"Dockerfile", "recipe/train.py", "requirements/gpu.lock"} <= set(names)
    assert not [name for name in names if name.startswith((".git", "runs", "build", ".venv")) or name.endswith(".pyc")]


def test_a_missing_engine_is_one_sentence() -> None:
    ended = command(sys.executable, "-m", "invoke", "image", DOCKER_HOST="unix:///nowhere.sock")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no container engine answers")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', "knows no NVIDIA runtime"),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0", "needs 580 or newer"),
        ("nvidia-container-cli: initialization error: nvml error: driver not loaded", "finds no working driver or GPU"),
    ],
)
def test_what_an_engine_says_becomes_a_sentence(message: str, sentence: str) -> None:
    from recipe.container.engine import explain

    assert sentence in explain(message)


@pytest.mark.parametrize(("driver", "sentence"), [("570.124.06", "is 570.124.06, too old"), ("", "no working GPU")])
def test_an_old_driver_and_no_gpu_are_told_before_anything_starts(
    driver: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recipe.container.engine import check_gpus
    from recipe.system.errors import UserError

    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho {driver}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=sentence):
        check_gpus()
    tool.write_text("#!/bin/sh\necho 580.65.06\n")
    check_gpus()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_passes_the_architecture_paths_and_further_flags_on(script: str, tmp_path: Path) -> None:
    folder = tmp_path / "GLM-4.7-Flash"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GLM_4_7_FLASH))
    words = [f"scripts/{script}", "--num-rollout", "17", "--check"]
    variables = {"BASE_DIR": str(tmp_path), "MASTER_ADDR": "127.0.0.1", "PYTHON": sys.executable}
    ended = command(*words, **variables)
    assert ended.returncode == 0, ended.stderr
    assert str(tmp_path / "dapo-math-17k" / "dapo-math-17k.jsonl") in ended.stdout
    (folder / "config.json").write_text(json.dumps(GLM_4_7_FLASH | {"num_hidden_layers": 46}))
    refused = command(*words, **variables)
    assert refused.returncode == 2
    assert "--num-layers" in refused.stderr


def test_several_nodes_need_an_address_and_shared_storage() -> None:
    ended = command("scripts/run-glm4.7-30B-A3B.sh", BASE_DIR="/tmp", MASTER_ADDR="")
    assert ended.returncode != 0
    assert "MASTER_ADDR" in ended.stderr
    joined = command(sys.executable, "-m", "recipe.cluster.join", MASTER_ADDR="127.0.0.1", BASE_DIR="")
    assert joined.returncode == 2
    assert joined.stderr.startswith("error: BASE_DIR is not set")
