"""Ray that does not start is started again, and then told of in a sentence."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipe.cluster.ray_node import logs_kept
from recipe.cluster.rendezvous import check_own_address
from recipe.config import Config
from recipe.system.errors import UserError

SLOW = Exception("The current node timed out during startup. This could happen because some of the raylet failed to")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """Starts Ray, which fails with one error after the other, and then starts. Returns what was done."""
    module: Any = import_module("recipe.cluster.ray_session")

    def run(*errors: Exception) -> list[str]:
        outcomes, done = iter([*errors, None]), list[str]()
        processes = SimpleNamespace(end_started=lambda: done.append("the rest is ended"))

        def init(*_: object) -> None:
            done.append("it is started")
            if (error := next(outcomes)) is not None:
                raise error

        monkeypatch.setattr(module, "_init_local", init)
        module._start_local(SimpleNamespace(run_dir=tmp_path), tmp_path / "scratch", 1 << 28, processes)
        return done

    return run


@pytest.mark.parametrize("error", [SLOW, OSError("address in use"), RuntimeError("a process died")])
def test_ray_that_starts_too_slowly_or_without_a_port_is_started_again(
    start: Callable[..., list[str]], error: Exception
) -> None:
    """Without what a start that failed has left: its death would be taken for that of a process of the run's."""
    assert start(error) == ["it is started", "the rest is ended", "it is started"]
    with pytest.raises(UserError, match=rf"^Ray does not start on this machine \({error}\)"):
        start(error, error)


@pytest.mark.parametrize("fault", [Exception("another"), ValueError("timed out during startup")])
def test_a_fault_of_the_program_is_no_failed_start(start: Callable[..., list[str]], fault: Exception) -> None:
    with pytest.raises(type(fault), match=str(fault)):
        start(fault)


def test_an_address_in_the_shell_where_no_ray_answers_is_named(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    module: Any = import_module("recipe.cluster.ray_session")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(module.ray, "init", lambda **_: (_ for _ in ()).throw(ConnectionError("refused")))
    with (
        pytest.raises(UserError, match=r"joined at RAY_ADDRESS=127\.0\.0\.1:9 \(refused\): unset RAY_ADDRESS"),
        module.ray_session(config, 1 << 28),
    ):
        pytest.fail("it was connected")


@pytest.mark.parametrize("address", ["::1", "no-such-host.invalid", "198.51.100.1"])
def test_an_address_of_another_machine_is_refused_before_ray_starts(address: str) -> None:
    with pytest.raises(
        UserError, match=rf"^{address} \(MASTER_ADDR, --master-addr\) is no IPv4 address of this machine"
    ):
        check_own_address(address)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate(
        {
            "model": {"hf_checkpoint": tmp_path},
            "data": {"prompt_data": tmp_path},
            "rollout": {"num_rollout": 1, "rollout_batch_size": 1, "rollout_max_response_len": 1},
            "optimizer": {"lr": 1},
        }
    )


def test_rays_logs_outlive_a_run_that_an_error_ends(tmp_path: Path) -> None:
    """They lie in the program's own folder, which goes with it."""
    scratch, session = tmp_path / "scratch", tmp_path / "scratch" / "ray" / "session_1"
    (session / "logs").mkdir(parents=True)
    (session / "logs" / "raylet.out").write_text("why")
    (scratch / "ray" / "session_latest").symlink_to(session)
    with logs_kept(scratch, tmp_path / "well"):
        pass
    assert not (tmp_path / "well").exists()
    with pytest.raises(UserError), logs_kept(scratch, tmp_path / "ill"):
        raise UserError("an engine died")
    assert (tmp_path / "ill" / "logs" / "ray" / "raylet.out").read_text() == "why"
    with pytest.raises(UserError, match="no space"), logs_kept(tmp_path / "none", tmp_path / "ill"):
        raise UserError("no space")


BEREFT = """
import asyncio, subprocess, sys, threading
from pathlib import Path
from recipe.cluster.ray_processes import RayProcesses
from recipe.system.errors import run_main

async def work():
    with RayProcesses(Path(sys.argv[1])) as processes:
        vital = subprocess.Popen(["sleep", "3600"])
        with processes.watched({"sleep": "sleeper"}):
            threading.Timer(0.2, vital.kill).start()
            if sys.argv[2] == "waits":
                await asyncio.sleep(3600)
            while True:
                sum(range(1000))

run_main(lambda: asyncio.run(work()))
"""


@pytest.mark.parametrize("meanwhile", ["waits", "computes"])
def test_the_death_of_a_vital_process_is_one_sentence(meanwhile: str, tmp_path: Path) -> None:
    """Whether the run waits in its event loop at that moment or not."""
    command = [sys.executable, "-c", BEREFT, str(tmp_path / "scratch"), meanwhile]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 2
    stopping, error = ended.stderr.splitlines()
    assert stopping.startswith("stopping: Ray's sleeper (pid ")
    assert error.startswith("error: Ray's sleeper (pid ")


OTHERS = """
import os, signal, subprocess, sys
from pathlib import Path
import psutil
from recipe.cluster import ray_processes

ray_processes.GRACE_S = 0.2
# The child that is here before starts one that stays its own, and one that it loses.
program = "echo ready; read go; sleep 900 & (sleep 901 & echo on) ; echo begun; wait"
other = subprocess.Popen(["bash", "-c", program], stdin=-1, stdout=-1, text=True, start_new_session=True)
other.stdout.readline()
with ray_processes.RayProcesses(Path(sys.argv[1])) as processes:
    print("go", file=other.stdin, flush=True)
    other.stdout.readline(), other.stdout.readline()
    ours = subprocess.Popen(["bash", "-c", "sleep 902 & echo begun; wait"], stdout=-1, text=True)
    ours.stdout.readline()
    processes.end_started()
    left = {word for process in psutil.Process().children(recursive=True) for word in process.cmdline()}
    print(*sorted(left & {"900", "901", "902"}))
os.killpg(other.pid, signal.SIGKILL)
"""


def test_what_somebody_else_starts_meanwhile_is_not_ended(tmp_path: Path) -> None:
    """As the check of SGLang's arguments does, while Ray is started again."""
    command = [sys.executable, "-c", OTHERS, str(tmp_path / "scratch")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.stdout == "900 901\n", ended.stderr


SHARING = """
import subprocess, sys, threading
from pathlib import Path
from recipe.cluster import ray_processes

graces = iter([0.3, 0.3, 0.3])  # for who is deaf; who removes shared memory has as long as it takes

class Ending(ray_processes.RayProcesses):
    @staticmethod
    def _end(processes, end):
        ray_processes.GRACE_S = next(graces, 60.0)
        ray_processes.RayProcesses._end(processes, end)

with Ending(Path(sys.argv[1])):
    sharer = subprocess.Popen(["sh", "-c", "trap '' TERM; echo ready; sleep 60 & wait; sleep 60"], stdout=-1)
    sharer.stdout.readline()
    program = f"trap 'echo ended; exit' TERM; while kill -0 {sharer.pid} 2>/dev/null; do sleep 0.02; done; echo removed"
    watcher = subprocess.Popen(["torch_shm_manager", "-c", program], executable="/bin/sh", stdout=-1)
    threading.Thread(target=sharer.wait, daemon=True).start()
print(watcher.stdout.read().decode(), end="")
"""


def test_the_watcher_of_shared_memory_outlives_those_who_share(tmp_path: Path) -> None:
    """One of them heeds no SIGTERM, as an engine that is stopped."""
    command = [sys.executable, "-c", SHARING, str(tmp_path / "scratch")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert ended.stdout == "removed\n", ended.stderr
