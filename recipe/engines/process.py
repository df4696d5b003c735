"""A server as a child process: started on a free port, watched until it is healthy, ended with all it has started."""

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from recipe.engines.launch import SCRATCH, Launch
from recipe.sampling.http import succeeds
from recipe.system.environment import handed_on
from recipe.system.errors import UserError
from recipe.system.parent_death import die_with
from recipe.system.ports import LOCAL, reserve_port_with

POLL_S = 0.1
HEALTH_TIMEOUT_S = 5.0
GRACE_S = 3.0
"""Time a server has to end by itself."""

_HIT = "hit an exception"
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception): ")
_PORT_TAKEN = re.compile(
    r"^.*(address already in use|EADDRINUSE|port is already in use|port\S* at \d+ is not available).*$",
    re.IGNORECASE | re.MULTILINE,
)
"""A line in which a server, or a library of its, says that it cannot have a port."""
_SHARED_MEMORY = re.compile(r"/dev/shm/\S+")


class PortTaken(UserError):
    """A server could not have a port that it needs; on others it may start."""


class EngineProcess:
    """One server. The thread that makes it must live as long: Linux ends the server with that thread."""

    def __init__(self, launch: Launch, log: Path, *, host: str = LOCAL) -> None:
        """Starts the server; its output goes to `log`."""
        self.port, self._reservation = reserve_port_with(host, launch.derived_ports)
        self.url = f"http://{host}:{self.port}"
        self._log = log
        self._segments: set[Path] = set()
        self._has_been_healthy = False
        self._scratch = tempfile.TemporaryDirectory(prefix="engine-", ignore_cleanup_errors=True)
        for name, content in launch.files.items():
            Path(self._scratch.name, name).write_text(content)
        arguments = [self._filled_in(word) for word in launch.arguments]
        environment = {name: self._filled_in(value) for name, value in launch.environment.items()}
        parent = os.getpid()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*arguments, "--host", host, "--port", str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=handed_on(os.environ) | environment,
                start_new_session=True,
                preexec_fn=lambda: die_with(parent),
            )

    def _filled_in(self, word: str) -> str:
        return word.replace(SCRATCH, self._scratch.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id, which is the id of the server's process group too."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_healthy(self, timeout_s: float, check_peers: Callable[[], None] = lambda: None) -> None:
        """Returns when the server can generate. Raises UserError, and stops it, if it ends or takes too long, or if
        `check_peers` raises one meanwhile."""
        deadline = time.monotonic() + timeout_s
        try:
            while not self._asks("GET", "/health_generate", HEALTH_TIMEOUT_S):
                check_peers()
                self.check_alive()
                if time.monotonic() > deadline:
                    raise self._failure(f"never became healthy in {timeout_s:g} s")
                time.sleep(POLL_S)
        except UserError:
            self.stop()
            raise
        self._segments, self._has_been_healthy = self._mapped_segments(), True

    def check_alive(self) -> None:
        """Raises UserError, with what its log says, if the server has ended: PortTaken if that was for want of a
        port."""
        if not self.alive:
            taken = _PORT_TAKEN.search(self._said())
            raise self._failure(f"ended with status {self._process.returncode}", PortTaken if taken else UserError)

    def _failure(self, what: str, kind: type[UserError] = UserError) -> UserError:
        return kind(f"the engine at {self.url} {what}; its log {self._log} says: {_telling_line(self._said())}")

    def _said(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> None:
        """Ends the server and every process of its group; returns when they are gone. One that has not become healthy
        has nothing to finish, and is killed."""
        if self._has_been_healthy and self._signal(signal.SIGTERM):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        self.kill()

    def kill(self) -> None:
        """Ends the server at once, also one that hangs or is stopped, and the shared memory that its processes talk
        through, which nobody else ends when they are killed. Any thread may call this, whatever another waits for."""
        if not self._has_been_healthy:
            self._segments = self._mapped_segments()
        self._signal(signal.SIGKILL)
        self._process.wait()
        for segment in self._segments:
            with contextlib.suppress(OSError):
                segment.unlink()
        self._reservation.close()
        self._scratch.cleanup()

    def generates(self, timeout_s: float) -> bool:
        """Whether the server generates a token. It is asked twice, so that one lost answer ends no engine."""
        return any(self.alive and self._asks("GET", "/health_generate", timeout_s) for _ in range(2))

    def answers(self, timeout_s: float) -> bool:
        """Whether the server answers anything at all, which it does even while its memory is released."""
        return self.alive and self._asks("GET", "/model_info", timeout_s)

    def release_memory(self, tags: Sequence[str], timeout_s: float) -> bool:
        """Has the server give the memory of `tags` back, once it is idle. Whether it did in time."""
        deadline = time.monotonic() + timeout_s
        while not self._asks("POST", "/flush_cache", timeout_s, {}):  # refused while a request is under way
            if not self.alive or time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return self._asks("POST", "/release_memory_occupation", timeout_s, {"tags": list(tags)})

    def resume_memory(self, tags: Sequence[str], timeout_s: float) -> bool:
        """Has the server take it again. Whether it did in time."""
        return self.alive and self._asks("POST", "/resume_memory_occupation", timeout_s, {"tags": list(tags)})

    def continue_generation(self, timeout_s: float) -> bool:
        """Has the server go on that was told to stand still. Whether it does."""
        return self.alive and self._asks("POST", "/continue_generation", timeout_s, {})

    def _mapped_segments(self) -> set[Path]:
        """Files of shared memory that the server's processes have mapped. Until it has just become healthy, they are
        its own: weights come later."""
        found: set[Path] = set()
        with contextlib.suppress(psutil.NoSuchProcess):
            server = psutil.Process(self.pid)
            for process in (server, *server.children(recursive=True)):
                with contextlib.suppress(OSError):
                    found |= set(map(Path, _SHARED_MEMORY.findall(Path(f"/proc/{process.pid}/maps").read_text())))
        return found

    def _signal(self, number: signal.Signals) -> bool:
        """Whether there was anybody in the group."""
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _asks(self, method: str, path: str, timeout_s: float, body: dict[str, object] | None = None) -> bool:
        return succeeds(method, self.url + path, body, timeout_s=timeout_s)


def _telling_line(said: str) -> str:
    """What ended a server, by its log: the last line; if that is an exception, the first one told after a process of
    SGLang's said that it hit one, for the others only follow from it."""
    lines = [line.strip() for line in said.rpartition(_HIT)[2].splitlines() if line.strip()] or ["(empty)"]
    if not _EXCEPTION.match(lines[-1]) and _HIT not in said:
        return lines[-1]
    return next((line for line in lines if _EXCEPTION.match(line)), lines[-1])
