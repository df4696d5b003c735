"""Host memory that a process may still take."""

from pathlib import Path

import psutil

from recipe.system.errors import UserError

CGROUP = Path("/sys/fs/cgroup")


def available_bytes(cgroup: Path = CGROUP) -> int:
    """What this machine, or the container that this process runs in, has left; cached files make room."""
    free = psutil.virtual_memory().available
    limit = cgroup / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])
        free = min(free, int(most) - int((cgroup / "memory.current").read_text()) + cached)
    return free


def require_host_memory(needed: int, what: str, remedy: str) -> None:
    """Raises UserError if the ranks of this machine, which need `needed` bytes together, would not fit. The kernel
    hands out memory that it does not have, and kills a process later, when it is used."""
    free = available_bytes()
    if needed > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB of host memory on this machine, and {free / 1e9:.1f} GB are "
            f"available: {remedy}"
        )
