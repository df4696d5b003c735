"""Calls that may hang, in processes that may be killed.

A worker is a fresh interpreter that serves one function (`recipe.rewards.serve`), one call at a time. A call that
exceeds its time has its worker killed, and the next call gets a new one. Nothing needs the main thread or signals in
the parent. Workers die with the parent, even if it is killed.
"""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Pipe

from recipe.system.environment import handed_on
from recipe.system.errors import UserError

START_TIMEOUT_S = 120.0
"""For importing the function's module on a busy machine; not part of the time of a call."""


@dataclass(frozen=True)
class Outcome:
    """What a call came to: its value, or None and why there is none."""

    value: object
    failure: str = ""


class Worker:
    """One process. Its methods may be called by one thread at a time, except `kill`."""

    def __init__(self, target: str, flag: str | None = None) -> None:
        self._connection, theirs = Pipe()
        descriptor = theirs.fileno()
        output = subprocess.DEVNULL if flag is None else None
        # A user's own reward may ask a model somewhere, with a key of the user's.
        environment = handed_on(os.environ) if flag is None else os.environ
        self._process = subprocess.Popen(
            [sys.executable, "-m", "recipe.rewards.serve", str(descriptor), target, *filter(None, [flag])],
            env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        theirs.close()
        self._target, self._flag, self._ready = target, flag, False

    def call(self, arguments: tuple[object, ...], timeout_s: float) -> Outcome:
        """Calls the function; the worker is dead afterwards if the outcome is that it took too long or died.

        Raises UserError if the function cannot be imported.
        """
        try:
            self.wait_until_ready()
            self._connection.send(arguments)
            if self._connection.poll(timeout_s):
                return Outcome(*self._connection.recv())
        except (EOFError, OSError):
            self.kill()
            return Outcome(None, f"the grading process died with status {self._process.returncode}")
        self.kill()
        return Outcome(None, f"no result within {timeout_s:g} s")

    def wait_until_ready(self) -> None:
        """Raises UserError if the function cannot be imported."""
        if self._ready:
            return
        if self._connection.poll(START_TIMEOUT_S):
            problem = self._connection.recv()
        else:
            problem = f"{self._flag or 'the function'} {self._target}: not imported within {START_TIMEOUT_S:g} s"
        if problem:
            self.kill()
            raise UserError(problem if self._flag else f"the grading process cannot start: {problem}")
        self._ready = True

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class WorkerPool:
    """At most `size` workers for `target` ("module:function"), started when none is idle; with the `flag` by which a
    user named it, for a custom reward."""

    def __init__(self, target: str, *, size: int, timeout_s: float, flag: str | None = None) -> None:
        self._target, self._flag = target, flag
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._workers: set[Worker] = set()
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="grader")

    def start(self, workers: int) -> None:
        """Starts so many workers beside whatever goes on, so that the first calls need not wait for their imports."""
        for _ in range(workers):
            self._threads.submit(self._start)

    def submit(self, *arguments: object) -> Future[Outcome]:
        """Queues a call; its time counts from when a worker takes it up."""
        return self._threads.submit(self._call, arguments)

    def close(self) -> None:
        """Kills the workers. Calls that are queued are cancelled; one in progress fails."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)

    def _start(self) -> None:
        with self._worker() as worker, suppress(UserError, EOFError, OSError):  # the next call will say why
            worker.wait_until_ready()

    def _call(self, arguments: tuple[object, ...]) -> Outcome:
        with self._worker() as worker:
            return worker.call(arguments, self._timeout_s)

    @contextmanager
    def _worker(self) -> Iterator[Worker]:
        """The one that was idle last, or a new one."""
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive:
                worker = self._replace(worker)
            yield worker
        finally:
            self._idle.put(worker)

    def _replace(self, dead: Worker | None) -> Worker:
        """A new worker. This thread lives as long as the pool, as it must: the kernel kills a worker with the thread
        that started it (prctl(2), PR_SET_PDEATHSIG)."""
        with self._lock:
            if dead is not None:
                self._workers.discard(dead)
            if self._closed:
                raise RuntimeError("the pool of grading processes is closed")
            worker = Worker(self._target, self._flag)
            self._workers.add(worker)
            return worker
