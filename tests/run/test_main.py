"""How commands end."""

import asyncio
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recipe.system.errors import UserError
from recipe.system.shutdown import SAVED_STATUS, OnFailure, saving_on_notice
from recipe.weights.tiny import write_tiny_checkpoint

PROGRAM = """
import sys, time
from recipe.system.errors import run_main

def main():
    print("ready", flush=True)
    try:
        while True:  # signal.pause would miss one that comes just before it
            time.sleep(0.05)
    except SystemExit:
        sys.exit(1)  # as Ray does when it is interrupted where it waits

run_main(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_gives_its_status_whatever_ray_makes_of_it(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 128 + number
    assert said == f"stopping: {number.name} received\n"


SAVING = """
import asyncio, sys
from pathlib import Path
from recipe.system.errors import run_main
from recipe.system.shutdown import saving_on_notice

def save():
    print("saving", flush=True)
    Path(sys.argv[1]).touch()

async def work():
    with saving_on_notice(save, grace_s=30):
        while True:
            print("ready", flush=True)
            await asyncio.sleep(0.05)

run_main(lambda: asyncio.run(work()))
"""


def test_a_terminal_that_is_closed_lets_what_is_done_be_saved(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path / "saved")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    assert process.wait(timeout=900) == SAVED_STATUS
    assert (tmp_path / "saved").exists()


async def test_what_the_run_fails_at_is_told_though_saving_fails_too_or_takes_too_long(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def save() -> None:
        raise UserError("the disk is full")

    def fail(save: Callable[[], None], *, has_unsaved: bool, limit_s: float = 900) -> str:
        on_failure = OnFailure(lambda: has_unsaved, save, limit_s, "--limit")
        with pytest.raises(UserError, match=r"^an engine is given up$"), saving_on_notice(save, 30, on_failure):
            raise UserError("an engine is given up")
        return capsys.readouterr().err

    assert "what is done is not saved (the disk is full)" in fail(save, has_unsaved=True)
    assert fail(save, has_unsaved=False) == ""
    late = fail(lambda: time.sleep(900), has_unsaved=True, limit_s=0.1)
    assert "what is done is not saved (it takes more than 0.1 s, --limit)" in late
    assert "what is done is saved" in fail(lambda: None, has_unsaved=True)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


async def test_a_run_that_fails_after_a_notice_has_the_time_that_the_notice_leaves() -> None:
    left: list[float] = []

    def save() -> None:
        left.append(signal.getitimer(signal.ITIMER_REAL)[0])

    async def work() -> None:
        with saving_on_notice(save, 30, OnFailure(lambda: True, save, 600, "--limit")):
            os.kill(os.getpid(), signal.SIGTERM)
            raise UserError("the engines got the notice too")

    with pytest.raises(UserError, match=r"^the engines got the notice too$"):
        await asyncio.create_task(work())
    assert 0 < left[0] <= 30
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_signal_that_the_parent_has_blocked_is_heeded() -> None:
    """As for a job of Ray's, whose processes block SIGINT."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=900)
    assert (process.returncode, said) == (130, "stopping: SIGINT received\n")


def test_a_full_disk_under_the_output_is_told_in_a_sentence() -> None:
    program = "from recipe.system.errors import run_main; run_main(lambda: print('x' * 100_000))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: the disk is full: where the output goes could not be written; free space there\n"


@pytest.mark.parametrize("flags", [["--name", "a" * 260], ["--save", "a" * 260], ["--prompt-data", "a" * 260]])
def test_a_name_that_no_file_system_takes_is_one_sentence(flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recipe.train", "--recipe", "tiny-sft", "--runs-dir", tmp_path, "--check"]
    write_tiny_checkpoint(tmp_path / "hf", 1)
    given = ["--hf-checkpoint", tmp_path / "hf", "--prompt-data", tmp_path / "none.jsonl", *flags]
    ended = subprocess.run([*command, *given], capture_output=True, text=True, timeout=900)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "too long" in ended.stderr.splitlines()[-1]
    assert len(ended.stderr.splitlines()[-1]) < 700


UNDISTURBED = """
import os, signal, threading, time
from recipe.system.errors import run_main
from recipe.system.imports import undisturbed

def main():
    threading.Thread(target=time.sleep, args=(2,), daemon=True).start()  # which takes what this thread blocks
    with undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        print("whole", flush=True)
    time.sleep(60)

run_main(main)
"""


def test_a_signal_waits_for_what_must_not_be_interrupted() -> None:
    ended = subprocess.run([sys.executable, "-c", UNDISTURBED], capture_output=True, text=True, timeout=900)
    assert ended.stdout == "whole\n"
    assert ended.returncode == 128 + signal.SIGTERM
    assert ended.stderr == "stopping: SIGTERM received\n"


IMPORTING = """
import sys
from pathlib import Path
from recipe.system.errors import run_main
from recipe.system.imports import load_function

Path("slow_module.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
sys.path.insert(0, ".")
run_main(lambda: load_function("--custom-rm-path", "slow_module:reward"))
"""


def test_a_signal_while_a_users_module_is_imported_is_no_fault_of_the_module(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTING], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 128 + signal.SIGTERM
    assert said == "stopping: SIGTERM received\n"
