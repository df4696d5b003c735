"""What a rank answers when it is asked where it is."""

import _thread
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from recipe.system.heartbeat import Heartbeat, RankLocation


def waiting_in(file: str) -> Callable[[_thread.LockType], None]:
    """A function of `file` that waits for a lock."""
    names: dict = {}
    exec(compile("def wait(lock):\n    lock.acquire()\n    lock.release()", file, "exec"), names)
    return names["wait"]


def wait_until_stuck(thread: int | None, function: str) -> None:
    deadline = time.monotonic() + 60
    while thread not in (frames := sys._current_frames()) or frames[thread].f_code.co_name != function:
        assert time.monotonic() < deadline, f"no thread ever was in {function}"
        time.sleep(0.01)


@contextmanager
def backward_pass(heartbeat: Heartbeat, file: str) -> Iterator[None]:
    """Meanwhile the followed thread waits in `file`, and one that Python did not start in a function `hook`."""
    lock, is_over = _thread.allocate_lock(), threading.Event()

    def work() -> None:
        heartbeat.follow_this_thread()
        waiting_in(file)(lock)

    def hook() -> None:
        lock.acquire()
        lock.release()
        is_over.set()

    with lock:
        thread = threading.Thread(target=work)
        thread.start()
        wait_until_stuck(thread.ident, "wait")
        wait_until_stuck(_thread.start_new_thread(hook, ()), "hook")
        yield
    thread.join()
    is_over.wait()


@pytest.mark.parametrize(("file", "is_followed"), [("torch/autograd/graph.py", True), ("recipe/work.py", False)])
def test_a_wait_for_autograd_is_followed_into_its_thread(file: str, is_followed: bool) -> None:
    heartbeat = Heartbeat()
    with backward_pass(heartbeat, f"/somewhere/{file}"):
        functions = [frame.function for frame in heartbeat.location().stack]
    assert {"work", "wait"} <= set(functions)
    assert ("hook" in functions) is is_followed


def test_who_has_nothing_to_do_is_nowhere() -> None:
    heartbeat = Heartbeat()
    heartbeat.beat()
    assert heartbeat.location() == RankLocation(0, ())


def test_only_the_thread_that_is_followed_beats() -> None:
    heartbeat = Heartbeat()
    heartbeat.follow_this_thread()
    heartbeat.beat()
    other = threading.Thread(target=lambda: [heartbeat.beat() for _ in range(5)])
    other.start()
    other.join()
    assert heartbeat.beats == 1
    with heartbeat.following(None):
        heartbeat.beat()
    heartbeat.beat()
    assert heartbeat.beats == 2
