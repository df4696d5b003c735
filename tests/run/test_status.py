"""status.json: what a run is doing and has cost, whatever ends it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from recipe.run.status import FILE, SILENT_S, RunState, Status, StatusWriter, is_alive, read_status

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
    deadline = time.monotonic() + 240
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


MOMENTS_S = 30.0
"""Between two looks at a clock, where others want the cores."""


def test_the_commands_of_a_run_add_up(killed: Path) -> None:
    hour = json.loads((killed / FILE).read_text()) | {"seconds": 3600.0, "dollars": 20.0}
    (killed / FILE).write_text(json.dumps(hour))
    before = found(killed)
    again = StatusWriter(killed, total_steps=10, gpus=8, price=2.5)
    status = again.status
    assert status.step == 3
    assert status.seconds == pytest.approx(before.seconds + status.beat - status.began, abs=MOMENTS_S)
    assert status.dollars == pytest.approx(status.seconds / 3600 * 20)
    again.close(RunState.FINISHED, "all rollouts are done")
    ended = found(killed)
    assert ended.now() == ended
    assert ended.seconds >= status.seconds


def test_each_command_is_paid_at_its_own_price(tmp_path: Path) -> None:
    first = StatusWriter(tmp_path, total_steps=10, gpus=8, price=2.5)
    first._status = replace(first._status, seconds=36_000.0, dollars=200.0)
    first.close(RunState.INTERRUPTED, "by a signal")
    before = found(tmp_path)
    second = StatusWriter(tmp_path, total_steps=10, gpus=24, price=2.5)
    status = second.status
    second.close(RunState.FINISHED, "")
    own = status.seconds - before.seconds
    assert own == pytest.approx(status.beat - status.began, abs=MOMENTS_S)
    assert status.dollars == pytest.approx(before.dollars + own / 3600 * 60)


def test_a_clock_that_is_set_back_changes_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = StatusWriter(tmp_path, total_steps=10, gpus=1, price=1.0)
    before = writer.status
    monkeypatch.setattr("recipe.run.status.time.time", lambda: before.beat - 7200)
    after = writer.status
    writer.close(RunState.FINISHED, "")
    assert 0 <= after.seconds - before.seconds < 600
    assert 0 <= after.dollars - before.dollars < 1


def test_what_the_metrics_say_is_counted_where_the_file_is_lost(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("")
    writer = StatusWriter(tmp_path, total_steps=10, gpus=8, price=2.5, least_s=7200.0)
    assert writer.status.seconds >= 7200
    assert writer.status.dollars >= 40
    writer.close(RunState.FINISHED, "")


def test_an_error_that_is_no_text_is_told_all_the_same(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, total_steps=10, gpus=1, price=1.0)
    writer.close(RunState.FAILED, "no file \udcff")
    assert found(tmp_path).doing == "no file \\udcff"


def test_another_machines_run_has_died_when_it_is_silent(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, total_steps=10, gpus=1, price=1.0)
    elsewhere = replace(writer.status, process=("another machine", 1, 0))
    writer.close(RunState.FINISHED, "")
    assert elsewhere.now().state is RunState.STARTING
    assert replace(elsewhere, beat=time.time() - 2 * SILENT_S).now().state is RunState.DIED


def test_a_number_that_another_process_has_now_is_not_the_run(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, total_steps=10, gpus=1, price=1.0)
    place, number, ticks = writer.status.process
    writer.close(RunState.FINISHED, "")
    assert is_alive((place, number, ticks))
    assert not is_alive((place, number, ticks - 100))


def test_a_disk_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()  # in the way of the file
    writer = StatusWriter(tmp_path, total_steps=10, gpus=1, price=1.0)
    writer.tell(RunState.RUNNING, "rollout")
    writer.close(RunState.FINISHED, "")
    assert read_status(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "of mind"}'])
def test_a_damaged_file_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None
