"""Host memory that a process may still take."""

from pathlib import Path

import psutil

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
