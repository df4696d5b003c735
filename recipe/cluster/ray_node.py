"""Ray on one node of a cluster: `ray start`, as a child that ends with this process and takes its own with it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from recipe.system.environment import handed_on
from recipe.system.errors import UserError
from recipe.system.parent_death import die_with

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 30
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
GCS_PORT, DASHBOARD_PORT = 6379, 8265
"""Ports of a cluster of several nodes. A run on one node takes free ports: there may be others."""
LOOPBACK = "127.0.0.1"
RAY = "ray"
"""Ray's sockets and logs, in a program's own folder."""
RAY_LOGS = Path("logs") / "ray"
"""Its logs, in the directory of a run that an error has ended."""
SHARED = "/tmp/ray"
"""In a cluster of several nodes they lie in one place on all of them."""
SHARED_LOGS = f"{SHARED}/session_latest/logs"
_STARTED = "Ray runtime started"


def keep_logs(scratch: Path, run_dir: Path) -> None:
    """Copies Ray's logs from a program's own folder, which ends with it, to the run directory, as far as it can."""
    logs = scratch / RAY / "session_latest" / "logs"
    with suppress(OSError, shutil.Error):
        shutil.copytree(logs.resolve(strict=True), run_dir / RAY_LOGS, dirs_exist_ok=True)


@contextmanager
def logs_kept(scratch: Path, run_dir: Path) -> Iterator[None]:
    """Where an error ends the block, `keep_logs`."""
    try:
        yield
    except Exception:
        keep_logs(scratch, run_dir)
        raise


@dataclass(frozen=True)
class NodeSize:
    """What Ray is told that a node has."""

    num_cpus: int
    object_store: int
    """Bytes of shared memory for what passes through Ray."""


class RayNode:
    """Use as a context manager: leaving it ends Ray on this node. The token is read from a file whose name goes by
    environment. `logs` is where its logs are to be read afterwards."""

    def __init__(self, arguments: Sequence[str], address: str, token: Path, size: NodeSize, logs: str) -> None:
        self._command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={address}"]
        self._command += [f"--num-cpus={size.num_cpus}", f"--object-store-memory={size.object_store}"]
        self._command += ["--disable-usage-stats", "--block"]
        # Its agent, which starts jobs, takes a free port itself, and tells Ray which: without one no job ever starts.
        self._command += ["--dashboard-agent-listen-port=0", *arguments]
        self._logs = logs
        self._environment = handed_on(os.environ, to_ray=True)
        self._environment |= {TOKEN_PATH: str(token), "RAY_USAGE_STATS_ENABLED": "0"}

    @classmethod
    def head(
        cls, address: str, token: Path, size: NodeSize, port: int, dashboard_port: int, own: tuple[Path, Path] | None
    ) -> Self:
        """The first node, which others join at `port`. Its dashboard listens on this machine's own loopback only.
        `own`, where there are no others: the program's folder, and the run directory."""
        arguments = [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard_port}"]
        arguments.append(f"--temp-dir={own[0] / RAY if own else SHARED}")
        logs = str(own[1] / RAY_LOGS) if own else SHARED_LOGS
        return cls(["--head", f"--port={port}", *arguments], address, token, size, logs)

    @classmethod
    def worker(cls, address: str, head: str, token: Path, size: NodeSize) -> Self:
        """A node that joins the head at `head` (HOST:PORT)."""
        return cls([f"--address={head}"], address, token, size, SHARED_LOGS)

    def __enter__(self) -> Self:
        """Returns when Ray has started. Raises UserError with what it says if it does not."""
        parent = os.getpid()
        self._output = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while _STARTED not in self._said():
            if not self.alive or time.monotonic() > deadline:
                said = self._said().strip().splitlines() or ["nothing"]
                self._stop()
                raise UserError(
                    f"Ray does not start on this node: {said[-1]} (its logs: {self._logs}; the "
                    "commonest causes are a port that is taken, a full /tmp and a small /dev/shm)"
                )
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def alive(self) -> bool:
        """Whether this node is still part of the cluster."""
        return self._process.poll() is None

    def _said(self) -> str:
        self._output.seek(0)
        return self._output.read()

    def _stop(self) -> None:
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._output.close()
