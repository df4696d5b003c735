"""Which ports the processes of a run listen on, and whom they answer."""

import http.client
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress

import psutil
from run_support import without_ray


def listening(processes: list[psutil.Process]) -> dict[str, set[str]]:
    """Addresses that each kind of process listens on."""
    found: dict[str, set[str]] = {}
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            for connection in process.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    address = f"{connection.laddr.ip}:{connection.laddr.port}"
                    found.setdefault(" ".join(process.cmdline()), set()).add(address)
    return found


def assert_doors_are_shut(processes: list[psutil.Process]) -> None:
    """Nobody outside is told anything, and nobody without the token."""
    doors = listening(processes)
    [engine] = [doors[name] for name in doors if "recipe.engines.embedded" in name]
    assert engine
    assert all(address.startswith("127.0.0.1:") for address in engine)
    ray_heads = [doors[name] for name in doors if "dashboard/dashboard.py" in name]  # none yet, if it is slow
    assert not any(address.startswith("127.0.0.1:") for head in ray_heads for address in head), "a dashboard"
    everywhere = [one for of_one in doors.values() for one in of_one if not one.startswith("127.0.0.1:")]
    assert not [address for address in everywhere if tells_metrics(address.rpartition(":")[2])]
    [gcs] = [doors[name] for name in doors if "gcs_server" in name]
    assert_gcs_refuses_strangers(next(iter(gcs)).split(":")[-1])


def tells_metrics(port: str) -> bool:
    """Whether anybody who asks is told how the run and its machine do."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return bool(answer.read(100).startswith(b"# HELP"))
    except (OSError, http.client.HTTPException):
        return False


def assert_gcs_refuses_strangers(port: str) -> None:
    program = f"from ray._raylet import GcsClient; GcsClient(address='127.0.0.1:{port}')"
    with socket.create_connection(("127.0.0.1", int(port)), timeout=240):
        for _ in range(20):  # where others want the cores it may be told first that nobody answers in time
            stranger = subprocess.run(
                [sys.executable, "-c", program], env=without_ray(), capture_output=True, text=True, timeout=900
            )
            assert stranger.returncode != 0
            if "AuthenticationError" in stranger.stderr:
                return
    raise AssertionError(stranger.stderr)
