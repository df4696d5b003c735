"""What a user meets first: `make help`, the lock files, the installer's refusals."""

import fcntl
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = {
    "cpu.lock": ("cpu.in", "dev.in"),
    "bench-trl.lock": ("bench-trl.in",),
    "sglang-cpu.lock": ("sglang-cpu.in",),
    "gpu.lock": ("cpu.in", "gpu.in", "dev.in"),
}
LOCKED_TOGETHER = ("cpu.lock", "gpu.lock")
GPU_LOCK = "gpu.lock"
"""The only one with torch and CUDA packages."""
PINNED = re.compile(r"^([a-z0-9-]+)==(\S+)", re.MULTILINE)


def make(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    arguments = [*words, *(f"{name}={value}" for name, value in variables.items())]
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def requirements(name: str) -> dict[str, str]:
    """Package (normalised) -> pinned version or ""."""
    found = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9_.-]+)(?:\[[\w,]+\])?(?:==(\S+)|<\S+)?", line)
            assert match, line
            found[re.sub(r"[-_.]+", "-", match[1]).lower()] = match[2] or ""
    return found


def test_make_lists_every_target_with_a_line():
    declared = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert declared
    listed = dict(re.findall(r"^  make (\S+) +(\S.*)$", make().stdout, re.MULTILINE))
    assert set(listed) == set(declared[1].split())
    assert make("help").stdout == make().stdout


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_covers_its_inputs_with_hashes(lock):
    text = (ROOT / "requirements" / lock).read_text()
    pinned = dict(PINNED.findall(text))
    assert text.count("--hash=sha256:") >= len(pinned)
    for source in LOCKS[lock]:
        for package, version in requirements(source).items():
            if package != "torch" or lock == GPU_LOCK:  # elsewhere it is installed apart
                assert pinned[package] == (version or pinned[package])


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_names_no_place_and_no_cuda_package(lock):
    text = (ROOT / "requirements" / lock).read_text()
    assert not re.search(r"://|--(index|extra|find|trusted)|@ |(^|\s)/", text)
    if lock != GPU_LOCK:
        assert not re.search(r"^(torch==|nvidia-(?!ml)|cuda-)", text, re.MULTILINE)


def test_the_image_has_the_versions_that_are_tested_without_a_gpu():
    tested, installed = (dict(PINNED.findall((ROOT / "requirements" / name).read_text())) for name in LOCKED_TOGETHER)
    windows = {"colorama", "pywin32"}
    assert tested.items() - installed.items() == {(name, tested[name]) for name in windows}
    assert installed["sglang"] == requirements("sglang-cpu.in")["sglang"]


def test_every_hash_line_belongs_to_a_pinned_package():
    for lock in LOCKS:
        lines = (ROOT / "requirements" / lock).read_text().splitlines()
        allowed = re.compile(r"[a-z0-9-]+==\S+( ; .+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?| *#.*|")
        assert [line for line in lines if not allowed.fullmatch(line)] == []


def test_the_locks_are_those_of_their_inputs():
    """`make lock` records both: whoever edits an input, or a lock by hand, is told."""
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
        cwd=ROOT / "requirements",
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, f"run `make lock`: {check.stdout}"
    recorded = {line.split()[1] for line in (ROOT / "requirements" / "SHA256SUMS").read_text().splitlines()}
    assert recorded == {path.name for path in (ROOT / "requirements").iterdir()} - {"SHA256SUMS"}


@pytest.mark.slow
def test_make_lock_gives_the_same_bytes_again(tmp_path):
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "Makefile", tmp_path)
    command = ["make", "-o", "install", "lock", f"BIN={Path(sys.executable).parent}"]
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert again.returncode == 0, again.stderr
    for path in (ROOT / "requirements").iterdir():
        assert (tmp_path / "requirements" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.fixture
def installation(tmp_path):
    """An installation that an unsuitable Python ends."""
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    return subprocess.Popen(
        [ROOT / "scripts" / "install.sh", str(tmp_path / "venv"), "cpu"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_unsuitable_python_is_one_sentence(installation, tmp_path):
    out, error = installation.communicate(timeout=900)
    assert installation.returncode == 1
    assert out == ""
    assert (
        error == f"error: PYTHON={tmp_path / 'python'} is not Python 3.11 or 3.12; name one that is, as in: "
        "make PYTHON=python3.12\n"
    )
    assert not (tmp_path / "venv").exists()


def test_what_a_link_points_to_is_not_emptied(tmp_path):
    others = tmp_path / "others"
    others.mkdir()
    (others / "kept").touch()
    (tmp_path / "venv").symlink_to(others)
    command = [ROOT / "scripts" / "install.sh", str(tmp_path / "venv"), "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 1
    assert (
        ended.stderr == f"error: {tmp_path}/venv is a link, and what it points to would be emptied; remove the link\n"
    )
    assert (others / "kept").exists()


def test_an_installation_waits_for_another_one(request):
    with (ROOT / "requirements" / "cpu.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        installation = request.getfixturevalue("installation")
        with pytest.raises(subprocess.TimeoutExpired):
            installation.wait(2)
    installation.communicate(timeout=900)
    assert installation.returncode == 1
