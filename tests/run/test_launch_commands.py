"""The commands of the rented-node path, printed and not run, and the launch scripts' flags."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from itertools import pairwise
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
    "download": "-m recipe.download all --base-dir data",
    "join": "-m recipe.cluster.join",
    "convert": "-m recipe.conversion.convert --recipe glm4.7-flash-8gpu-mtp --hf-checkpoint",
    "export": "-m recipe.conversion.export --load runs/tiny/checkpoints",
    "smoke": "-m recipe.smoke --device auto --engine embedded --price 2.5",
    "report": "-m recipe.run.report runs/tiny",
    "mismatch": "-m recipe.mismatch runs/tiny",
    "tune": "-m recipe.plan.tune --recipe 'glm4.7-flash-8gpu'",
    "bench": "scripts/bench_trainer.py",
}


def command(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In an environment that knows nothing of the `make` that may have started the tests."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        words, cwd=ROOT, env=own | variables, capture_output=True, text=True, timeout=900, check=False
    )


def test_a_dry_run_is_asked_for_before_make_too() -> None:
    words = ["make", "--no-print-directory", "-o", "install", "train-8gpu", f"BIN={Path(sys.executable).parent}"]
    ended = command(*words, DRY_RUN="1")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("+ ")
    assert TARGETS["train-8gpu"] in ended.stdout


SIGNALLED = """
import os, signal
from recipe.container.run import _passing_signals_on

with _passing_signals_on(lambda name: print(name, flush=True)):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), number)
"""


def test_a_closed_terminal_reaches_the_container_too() -> None:
    assert command(sys.executable, "-c", SIGNALLED).stdout.split() == ["SIGINT", "SIGTERM", "SIGHUP"]
    ignored = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    assert command(sys.executable, "-c", ignored + SIGNALLED).stdout.split() == ["SIGINT", "SIGTERM"], "under nohup"


@pytest.mark.parametrize("line", re.findall(r"^make \S+ BASE_DIR=[^#\n]*", PAGES, re.MULTILINE))
def test_the_commands_of_the_rented_node_parse(line: str) -> None:
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


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """What make needs of the repository, with an installer that leaves a trace."""
    copy = tmp_path / "copy"
    for folder in ("recipe", "scripts", "requirements"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("Makefile", "tasks.py", "Dockerfile"):
        shutil.copy(ROOT / file, copy)
    (copy / "scripts" / "install.sh").write_text("#!/bin/sh\ntouch installed\n")
    return copy


def all_targets() -> list[str]:
    return re.findall(r"^  make (\S+)", command("make", "--no-print-directory").stdout, re.MULTILINE)


@pytest.mark.parametrize("installed", [False, True])
def test_a_dry_run_of_any_target_prints_its_command_and_starts_and_writes_nothing(
    scratch: Path, installed: bool
) -> None:
    before = {path: path.stat().st_mtime_ns for path in scratch.rglob("*")}
    others = [target for target in all_targets() if target not in TARGETS]
    words = ["make", "-C", str(scratch), "--no-print-directory", "DRY_RUN=1", *TARGETS, *others]
    words += [f"BIN={Path(sys.executable).parent}"] * installed
    ended = command(*words, PYTHONDONTWRITEBYTECODE="1", DOCKER_HOST="unix:///nowhere.sock")
    assert ended.returncode == 0, ended.stderr
    assert {path: path.stat().st_mtime_ns for path in scratch.rglob("*")} == before
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("  make ")]
    assert all(line.startswith("+ ") for line in lines)
    assert ("+ scripts/install.sh .venv cpu project" in lines) is not installed
    assert any("docker run" in line for line in lines) is installed
    assert any("pytest" in line for line in lines)
    if installed:
        in_order = iter(lines)
        assert [part for part in TARGETS.values() if not any(part in line for line in in_order)] == []


def told_words(folder: Path) -> Path:
    """Stands for an interpreter: prints its own name and the words that it is given, as JSON."""
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    python.chmod(0o755)
    return python


def test_quotes_and_spaces_in_args_arrive(tmp_path: Path) -> None:
    given = ["--rollout-stop", "a b", "it's", '"', "$HOME", "*"]
    words = ["make", "--no-print-directory", "-o", "install", f"BIN={Path(sys.executable).parent}", "DRY_RUN=1"]
    ended = command(*words, "train-8gpu", "ARGS=" + shlex.join(given))
    assert ended.returncode == 0, ended.stderr
    script = shlex.split(ended.stdout)[-len(given) - 1 :]
    assert script == [f"scripts/{SCRIPTS[0]}", *given]
    assert json.loads(command(*script, PYTHON=str(told_words(tmp_path)), BASE_DIR="/").stdout)[-len(given) :] == given


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a b", "$(touch made)", "-x", "a;b"])
def test_a_name_that_is_a_path_or_more_is_refused(scratch: Path, name: str) -> None:
    (scratch / "x").mkdir()
    ended = command("make", "-C", str(scratch), "train-tiny", f"NAME={name}")
    assert ended.returncode == 2
    assert f"NAME={name} is no name of a run" in ended.stderr
    assert not (scratch / "installed").exists()
    assert not (scratch / "made").exists()
    assert (scratch / "x").is_dir()


def test_a_printed_container_does_the_same_in_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipe.container.run import ContainerRun

    data, work = tmp_path / "my, data", tmp_path / "my work"
    data.mkdir()
    run = ContainerRun(["echo", "a b"], data=data, work_dir=work, several_nodes=True)
    docker = tmp_path / "docker"
    docker.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    pasted = command("bash", "-c", run.command_line())
    assert pasted.returncode == 0, pasted.stderr
    assert (work / "runs").is_dir()
    words = json.loads(pasted.stdout)
    assert words[-3:] == [run.image, *run.options()["command"]]
    mounts = [next(csv.reader([word])) for flag, word in pairwise(words) if flag == "--mount"]
    assert mounts == [[f"{key.lower()}={value}" for key, value in mount.items()] for mount in run.options()["mounts"]]
    assert "MASTER_ADDR=10.0.0.1" in words
    assert run.options()["environment"]["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize(
    ("task", "made", "sentence"),
    [
        ("train-8gpu", False, "is no folder on this machine"),
        ("train-8gpu", True, "holds no GLM-4.7-Flash: `make download BASE_DIR="),
        ("join", False, "is no folder on this machine"),
        ("bench", False, "is no folder on this machine"),
    ],
)
def test_data_that_are_not_there_are_told_and_no_folder_is_made(
    task: str, made: bool, sentence: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    if made:
        folder.mkdir()
    words = [sys.executable, "-m", "invoke", task, "--base-dir", str(folder), "--work-dir", str(tmp_path / "work")]
    ended = command(*words, DOCKER_HOST="unix:///nowhere.sock")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: BASE_DIR=")
    assert sentence in ended.stderr
    assert folder.exists() is made
    assert not (tmp_path / "work").exists()


def test_the_narrated_script_prints_all_commands_and_runs_none(tmp_path: Path) -> None:
    (tmp_path / "make").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "make").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    ended = command("scripts/8xh100.sh", DRY_RUN="1", BASE_DIR="/my data", PATH=path)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "started").exists()
    lines = [shlex.split(line) for line in ended.stdout.splitlines()]
    assert {line[0] for line in lines} == {"+"}
    steps = [line[2] for line in lines]
    assert steps == [
        "install",
        "image",
        "smoke",
        "download",
        "convert",
        "plan",
        "train-8gpu",
        "report",
        "export",
        "shell",
    ]
    for _, program, *words in lines[:-1]:
        printed = command(program, "--no-print-directory", f"BIN={Path(sys.executable).parent}", "DRY_RUN=1", *words)
        assert printed.returncode == 0, printed.stderr
    score = shlex.split(lines[-1][-1])
    evaluation = command(*score, "DRY_RUN=1", f"BIN={Path(sys.executable).parent}").stdout
    data = "/my data/aime-2024/aime-2024.jsonl"
    assert shlex.split(evaluation)[-4:] == ["--data", data, "--engine-args", "--tp-size 4 --dp-size 2"]


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
def test_a_script_passes_the_architecture_paths_and_further_flags_on(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the launcher, which reads them here as in a process of its own; SGLang is not asked about its part."""
    from recipe.cluster import launch
    from recipe.engines import argument_check
    from recipe.system.errors import UserError

    monkeypatch.setattr(argument_check, "find_sglang_python", lambda named: None)
    folder = tmp_path / "GLM-4.7-Flash"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(GLM_4_7_FLASH))
    variables = {"BASE_DIR": str(tmp_path), "MASTER_ADDR": "127.0.0.1", "PYTHON": str(told_words(tmp_path))}
    started = command(f"scripts/{script}", "--num-rollout", "17", "--check", **variables)
    assert started.returncode == 0, started.stderr
    words = json.loads(started.stdout)
    assert words[1:3] == ["-m", "recipe.cluster.launch"]
    monkeypatch.setattr(sys, "argv", words[2:])
    launch.main()
    told = capsys.readouterr().out
    assert str(tmp_path / "dapo-math-17k" / "dapo-math-17k.jsonl") in told
    assert re.search(r"^ *num_rollout += 17 ", told, re.MULTILINE), told
    (folder / "config.json").write_text(json.dumps(GLM_4_7_FLASH | {"num_hidden_layers": 46}))
    with pytest.raises(UserError, match="--num-layers"):
        launch.main()


def test_several_nodes_need_an_address_and_shared_storage() -> None:
    ended = command("scripts/run-glm4.7-30B-A3B.sh", BASE_DIR="/tmp", MASTER_ADDR="")
    assert ended.returncode != 0
    assert "MASTER_ADDR" in ended.stderr
    joined = command(sys.executable, "-m", "recipe.cluster.join", MASTER_ADDR="127.0.0.1", BASE_DIR="")
    assert joined.returncode == 2
    assert joined.stderr.startswith("error: BASE_DIR is not set")
