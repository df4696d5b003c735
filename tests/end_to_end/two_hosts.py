"""Two hosts on one machine: network namespaces, joined by a cable that can be cut."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUPPORT = Path(__file__).parent
HEAD, WORKER = "10.213.77.1", "10.213.77.2"


@dataclass(frozen=True)
class Host:
    """A namespace with one address besides its loopback, and memory that it shares with nobody."""

    name: str
    address: str

    def command(self, *words: str) -> list[str]:
        """The command, on this host. It has shared memory of its own, by which programs tell machines apart."""
        own_memory = ["sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.name, *own_memory, *words]

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host to its end."""
        return subprocess.run(
            self.command(*words),
            env=environment(variables),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def start(self, log: Path, *words: str, **variables: str) -> subprocess.Popen:
        """Starts a command on this host, with its output in `log`."""
        with log.open("w") as output:
            return subprocess.Popen(
                self.command(*words), env=environment(variables), stdout=output, stderr=subprocess.STDOUT
            )

    def listening(self) -> dict[int, set[str]]:
        """Addresses that are listened on, by process id."""
        found: dict[int, set[str]] = {}
        for line in self.run("ss", "-H", "-l", "-t", "-n", "-p").stdout.splitlines():
            local = line.split()[3]
            for pid in re.findall(r"pid=(\d+)", line):
                found.setdefault(int(pid), set()).add(local.rpartition(":")[0])
        return found


def environment(variables: dict[str, str]) -> dict[str, str]:
    """A user's, with more `variables`: other tests may have set Ray's in this process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return own | {"PYTHONPATH": f"{SUPPORT}:{own.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"} | variables


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The head and the worker; gone afterwards."""
    head, worker = Host(f"recipe-head-{os.getpid()}", HEAD), Host(f"recipe-node-{os.getpid()}", WORKER)
    try:
        for host in (head, worker):
            ip("netns", "add", host.name)
            ip("-n", host.name, "link", "set", "lo", "up")
        ip("-n", head.name, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", worker.name)
        for host, end in ((head, "cable0"), (worker, "cable1")):
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", end)
            ip("-n", host.name, "link", "set", end, "up")
        yield head, worker
    finally:
        for host in (head, worker):
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True)


def cut(head: Host) -> None:
    """No packet passes between the two any more, and nobody is told."""
    ip("-n", head.name, "link", "set", "cable0", "down")


def ip(*words: str) -> None:
    """A command of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def python(*words: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *words]
