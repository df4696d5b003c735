"""status.json: what a run is doing and has cost, whatever ends it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.run.status import SILENT_S, RunState, Status, StatusWriter, is_alive, read_status

WRITER = """
import sys, time
from pathlib import Path
from recipe.run.status import RunState, StatusWriter
writer = StatusWriter(Path(sys.argv[1]), total_steps=10, gpus=8, price=2.5)
writer.tell(RunState.RUNNING, "rollout")
writer.count(3)
print("told", flush=True)
time.sleep(600)
"""


def found(run: Path) -> Status:
    status = read_status(run)
    assert status is not None
    return status


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The directory of a run that was killed in its fourth step."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 30
    while found(tmp_path).step != 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found(tmp_path).now().state is RunState.RUNNING
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return tmp_path


def test_a_killed_run_has_died_where_it_was(killed: Path) -> None:
    status = found(killed).now()
    assert (status.state, status.doing, status.step) == (RunState.DIED, "rollout", 3)


def test_the_commands_of_a_run_add_up(killed: Path) -> None:
    before = found(killed)
    again = StatusWriter(killed, total_steps=10, gpus=8, price=2.5)
    status = again.status
    assert status.step == 3
    assert status.seconds == pytest.approx(before.seconds + status.beat - status.began)
    assert status.dollars == pytest.approx(status.seconds / 3600 * 20)
    again.close(RunState.FINISHED, "all rollouts are done")
    ended = found(killed)
    assert ended.now() == ended
    assert ended.seconds >= status.seconds


def test_another_machines_run_has_died_when_it_is_silent(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, total_steps=10, gpus=1, price=1.0)
    elsewhere = replace(writer.status, process=("another machine", 1, 0.0))
    writer.close(RunState.FINISHED, "")
    assert is_alive(elsewhere.process)
    assert elsewhere.now().state is RunState.STARTING
    assert replace(elsewhere, beat=time.time() - 2 * SILENT_S).now().state is RunState.DIED


def test_a_number_that_another_process_has_now_is_not_the_run(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, total_steps=10, gpus=1, price=1.0)
    place, number, began = writer.status.process
    writer.close(RunState.FINISHED, "")
    assert is_alive((place, number, began))
    assert not is_alive((place, number, began - 100))


def test_a_disk_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / ".status.json.new").mkdir()  # in the way of the file
    writer = StatusWriter(tmp_path, total_steps=10, gpus=1, price=1.0)
    writer.tell(RunState.RUNNING, "rollout")
    writer.close(RunState.FINISHED, "")
    assert read_status(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "of mind"}'])
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None
