"""What a program leaves in the folder for temporary files: nothing, however it ends."""

import getpass
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipe.system import scratch
from recipe.system.environment import PASS, handed_on
from recipe.system.errors import UserError
from recipe.system.scratch import COMPILED, JUST_MADE_S, TMPDIR, scratch_folder

PROGRAM = """
import tempfile, time
from recipe.system.scratch import scratch_folder
with scratch_folder():
    print(tempfile.mkdtemp(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, with a short name."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv(TMPDIR, folder)
        monkeypatch.delenv(COMPILED, raising=False)
        yield Path(folder)


def test_temporary_files_lie_in_a_folder_that_goes_with_the_program(place: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == place
        assert folder.stat().st_mode & 0o777 == 0o700
        assert Path(tempfile.mkdtemp()).parent == folder
        child = subprocess.run(
            [sys.executable, "-c", "import tempfile; print(tempfile.gettempdir())"], capture_output=True
        )
        assert child.stdout.decode().strip() == str(folder)
        assert Path(os.environ[COMPILED]).parent == place, "kernels are compiled once, not once a run"
    assert list(place.iterdir()) == []
    assert tempfile.gettempdir() == os.environ[TMPDIR] == str(place)
    assert COMPILED not in os.environ


def test_a_user_without_a_name_has_a_place_for_kernels_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is given any number for a user."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 10001")

    monkeypatch.setattr(getpass, "getuser", nobody)
    with scratch_folder():
        assert os.environ[COMPILED] == str(place / f"torchinductor_{os.getuid()}")


def aged(folder: Path) -> None:
    then = time.time() - 2 * JUST_MADE_S
    os.utime(folder, (then, then))


def test_the_next_start_removes_what_a_killed_program_has_left_and_nothing_else(place: Path) -> None:
    killed, living = (
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    left, kept = (Path(one.stdout.readline().strip()).parent for one in (killed, living) if one.stdout)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    for name in ("recipe-notes", "other"):
        (place / name).mkdir()
        (place / name / "by hand").touch()
    for folder in place.iterdir():
        aged(folder)
    try:
        with scratch_folder():
            assert not left.exists()
            assert kept.exists()
            assert (place / "recipe-notes" / "by hand").exists()
            assert (place / "other" / "by hand").exists()
    finally:
        living.kill()
        living.communicate()


def test_a_folder_with_too_long_a_name_for_sockets_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with scratch_folder() as folder:
        assert folder.parent == Path("/tmp")
    monkeypatch.setattr(scratch, "USUAL", tmp_path / "none")
    with pytest.raises(
        UserError, match=r"too long a name for sockets, and .* set TMPDIR to a folder of at most \d\d c"
    ):
        scratch_folder().__enter__()


def test_processes_get_what_they_need_of_the_environment_and_no_credentials() -> None:
    needed = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "1", "NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false"}
    others = {"HF_TOKEN": "x", "WANDB_API_KEY": "x", "AWS_SECRET_ACCESS_KEY": "x", "CLOUD": "x", "HTTP_PROXY": "u:p@h"}
    ray = {"RAY_ADDRESS": "x", "RAY_AUTH_TOKEN_PATH": "/t"}
    assert handed_on(needed | others | ray) == needed
    assert handed_on(needed | others | ray | {"RAY_AUTH_TOKEN": "x"}, to_ray=True) == needed | ray
    assert handed_on(needed | others | {PASS: "CLOUD, HF_TOKEN"}) == needed | {"CLOUD": "x", "HF_TOKEN": "x"} | {
        PASS: "CLOUD, HF_TOKEN"
    }
