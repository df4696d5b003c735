import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from recipe.rewards.workers import Outcome, WorkerPool
from recipe.system.errors import UserError

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def pool():
    pool = WorkerPool("functions_for_workers:obey", size=2, timeout_s=1)
    yield pool
    pool.close()
    assert worker_processes() == []


def worker_processes(parent: int = os.getpid()) -> list[int]:
    """Processes, not yet reaped ones included, that serve for `parent`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rpartition(")")[2].split()[1]) == parent and b"recipe.rewards.serve" in command:
                found.append(int(entry.name))
    return found


def test_starts_nothing_before_it_is_needed(pool):
    assert worker_processes() == []
    assert pool.submit("nothing", "").result() == Outcome(True)
    assert len(worker_processes()) == 1


def test_workers_that_were_started_early_take_the_calls(pool):
    pool.start(2)
    deadline = time.monotonic() + 120
    while len(early := worker_processes()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pool.submit("nothing", "").result() for _ in range(3)] == [Outcome(True)] * 3
    assert sorted(worker_processes()) == sorted(early)
    assert len(early) == 2


def test_a_worker_that_is_idle_takes_a_call_before_another_is_started(pool):
    for _ in range(3):
        pool.submit("nothing", "").result()
    assert len(worker_processes()) == 1


@pytest.mark.parametrize("hang", [("sleep", "600"), ("compute", "10")])
def test_a_call_that_hangs_is_killed_and_the_next_one_works(pool, hang):
    pool.submit("nothing", "").result()
    assert pool.submit(*hang).result() == Outcome(None, "no result within 1 s")
    assert pool.submit("nothing", "").result() == Outcome(True)


def test_works_off_the_main_thread(pool):
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(pool.submit("sleep", "600").result()))
    thread.start()
    thread.join(timeout=240)
    assert outcomes == [Outcome(None, "no result within 1 s")]


def test_a_call_that_raises_or_dies_or_eats_memory_fails_with_the_reason(pool):
    assert pool.submit("raise", "what").result() == Outcome(None, "ValueError: what")
    assert pool.submit("die", "3").result() == Outcome(None, "the grading process died with status 3")
    assert pool.submit("eat", str(8 << 30)).result() == Outcome(None, "MemoryError: ")
    assert pool.submit("nothing", "").result() == Outcome(True)


def test_a_worker_that_was_killed_while_idle_harms_no_call(pool):
    pool.submit("nothing", "").result()
    [pid] = worker_processes()
    os.kill(pid, 9)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert [pool.submit("nothing", "").result() for _ in range(3)] == [Outcome(True)] * 3


def test_calls_are_answered_in_parallel_and_each_with_its_own_answer():
    pool = WorkerPool("functions_for_workers:same", size=2, timeout_s=5)
    futures = [pool.submit(str(i % 7), "3") for i in range(100)]
    assert [future.result().value for future in futures] == [i % 7 == 3 for i in range(100)]
    assert len(worker_processes()) <= 2
    pool.close()


def test_closing_does_not_wait_for_a_hung_call(tmp_path):
    pool = WorkerPool("functions_for_workers:obey", size=1, timeout_s=600)
    hung = pool.submit("touch", str(tmp_path / "begun"))
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    pool.close()
    assert hung.result().value is None
    assert worker_processes() == []


def test_a_function_that_is_not_there_is_a_clear_error():
    for target, problem in [("no_such_module:f", "No module named"), ("functions_for_workers:missing", "missing")]:
        pool = WorkerPool(target, size=1, timeout_s=1)
        pool.start(1)
        with pytest.raises(UserError, match=f"the grading process cannot start: .*{problem}"):
            pool.submit("a", "b").result()
        pool.close()


def test_workers_die_with_a_parent_that_is_killed():
    script = """if True:
        import sys
        from recipe.rewards.workers import WorkerPool
        pool = WorkerPool("functions_for_workers:obey", size=1, timeout_s=600)
        pool.submit("nothing", "").result()
        pool.submit("compute", "10")
        print("ready", flush=True)
        sys.stdin.read()
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, env=environment)
    assert parent.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    (worker,) = worker_processes(parent.pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
