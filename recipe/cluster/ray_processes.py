"""Ray's processes, as the program sees them that has started Ray on this machine: it hears at once of the death of one
that nothing goes on without, and ends all that are left when it is done.

Ray itself tells of a dead control service after a minute, and ends the program where it stands; and when the program is
killed, Ray's agents look for the control service that long before they end.
"""

import asyncio
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

from recipe.system.errors import USER_ERROR_STATUS, UserError
from recipe.system.reaper import GRACE_S

VITAL = {
    "gcs_server": "control service (gcs_server)",
    "raylet": "node manager (raylet)",
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime-environment agent",
}
"""What a run cannot go on without, by the name that the process bears: raylet and agents end together."""
VITAL_TO_RAY_START = VITAL | {
    "dashboard.py": "dashboard",
    "log_monitor.py": "log monitor",
    "monitor.py": "autoscaler's monitor",
}
"""`ray start --block` ends with any of its processes."""
_DEATH = signal.SIGUSR2
"""From the thread that waits for a death to the main thread."""
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None)


class RayProcesses:
    """Use as a context manager, in the main thread, around Ray's start and end: leaving it ends every process that is
    left of those that descend from this one and did not on entering it; what those that did start meanwhile is their
    own. Meanwhile Linux makes the orphans among them children of this process, so that none is lost sight of.
    `scratch`, the program's folder, goes with them."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def __enter__(self) -> Self:
        reaper = [sys.executable, "-m", "recipe.system.reaper", str(self._scratch)]
        self._reaper = subprocess.Popen(reaper, stdin=subprocess.PIPE, text=True, start_new_session=True)
        self._others = set(psutil.Process().children(recursive=True))
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_started()
        self._reaper.communicate()
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)

    def end_started(self) -> None:
        """Ends what leaving it would end."""
        for end in (None, psutil.Process.terminate, psutil.Process.kill):
            self._end([process for process in self._started() if not _removes_shared_memory(process)], end)
        for end in (None, psutil.Process.kill):
            self._end(self._started(), end)

    @staticmethod
    def _end(processes: Collection[psutil.Process], end: Callable[[psutil.Process], None] | None) -> None:
        """Sends them what `end` sends, and gives them time."""
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                if end is not None:
                    end(process)
        psutil.wait_procs(processes, GRACE_S)

    @contextmanager
    def watched(self, vital: dict[str, str]) -> Iterator[None]:
        """The death of a `vital` process ends the block, which raises UserError then, whatever failed first for it. If
        this process is killed, what has been started till now is ended."""
        deaths: list[str] = []
        started = self._started()
        assert self._reaper.stdin is not None
        self._reaper.stdin.write("".join(f"{process.pid}\n" for process in started) + "\n")
        self._reaper.stdin.flush()

        task = _current_task()

        def unwind(number: int, frame: FrameType | None) -> None:
            if task is not None and _current_task() is None:
                task.get_loop().call_soon_threadsafe(task.cancel)  # what is raised in a waiting loop misses the task
                return
            raise SystemExit(USER_ERROR_STATUS)

        before = signal.signal(_DEATH, unwind)
        try:
            with _told_of_death(started, vital, deaths):
                yield
        except BaseException:
            if deaths:
                raise UserError(
                    f"{deaths[0]}: it was killed, most often for want of memory; start again with --load to go on from "
                    "the last checkpoint"
                ) from None
            raise
        finally:
            signal.signal(_DEATH, before)

    def _started(self) -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        others = set(self._others)
        for other in self._others:
            with suppress(psutil.NoSuchProcess):
                others.update(other.children(recursive=True))
        sessions = {process.pid for process in self._others}
        return [process for process in found if process not in others and _session_of(process) not in sessions]


@contextmanager
def _told_of_death(processes: Collection[psutil.Process], vital: dict[str, str], deaths: list[str]) -> Iterator[None]:
    """In the block, the first death of a vital process is written to `deaths` and stderr, and the main thread gets the
    signal for it."""
    main = threading.get_ident()
    asleep, wake = os.pipe()
    descriptors = [asleep, wake]

    def wait() -> None:
        [(key, _), *_] = selector.select()
        if key.fd != asleep:
            deaths.append(f"Ray's {key.data} died")
            print(f"stopping: {deaths[0]}", file=sys.stderr, flush=True)
            signal.pthread_kill(main, _DEATH)

    with selectors.DefaultSelector() as selector:
        selector.register(asleep, selectors.EVENT_READ)
        for process in processes:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                if (kind := _kind(process, vital)) is not None:
                    descriptors.append(os.pidfd_open(process.pid))
                    selector.register(descriptors[-1], selectors.EVENT_READ, f"{vital[kind]} (pid {process.pid})")
        watcher = threading.Thread(target=wait, name="waits for a death", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            os.write(wake, b"\n")
            watcher.join()
            for descriptor in descriptors:
                os.close(descriptor)


def _session_of(process: psutil.Process) -> int | None:
    """Which stays the same when it becomes an orphan. None: it is gone."""
    with suppress(ProcessLookupError):
        return os.getsid(process.pid)
    return None


def _removes_shared_memory(process: psutil.Process) -> bool:
    """Whether it is torch's watcher of shared memory: it ends when all who shared some have ended, and removes then
    what they left in /dev/shm."""
    with suppress(psutil.NoSuchProcess):
        return any(word.endswith("torch_shm_manager") for word in process.cmdline()[:1])
    return False


def _current_task() -> asyncio.Task[Any] | None:
    """The one at work in this thread; None where none is, or no loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def _kind(process: psutil.Process, vital: dict[str, str]) -> str | None:
    """Which of the `vital` it is, by the program or the Python file that it runs, or the title that it has taken."""
    names = [os.path.basename(word.rstrip()) for word in process.cmdline()[:3]]
    return next((name for name in names if name in vital), None)
