"""The machine that this process runs on: GPUs by nvidia-smi, memory, disk, and its container's limits."""

import os
import re
import resource
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from recipe.plan.hardware import DEFAULT_GPU, GPUS, Gpu
from recipe.system.memory import available_bytes

NVIDIA_SMI = "nvidia-smi"
_QUERY = ("name", "memory.total", "memory.reserved", "memory.used", "driver_version")
_TIMEOUT_S = 30
SHARED_MEMORY = Path("/dev/shm")
MIB = 2**20


@dataclass(frozen=True)
class FoundGpu:
    """One GPU of this machine; memory in bytes."""

    name: str
    memory: int
    """What a process can allocate at most."""
    used: int
    driver: str

    def described(self) -> Gpu:
        """Its kind, with the memory that it really has. Of one that is not known, the rates of the default kind."""
        word = next((name for name in GPUS if name.partition("-")[0] in self.name), DEFAULT_GPU)
        known = GPUS[word]
        rates = known.flops, known.memory_bandwidth, known.link_bandwidth, known.pcie_bandwidth
        return Gpu(self.name, self.memory, *rates)


@dataclass(frozen=True)
class FoundMachine:
    """What there is, in bytes where nothing else is said."""

    gpus: tuple[FoundGpu, ...]
    linked: bool
    """Whether every pair of GPUs has NVLink."""
    host_memory: int
    """What this machine has, or the container that this process runs in, without what others use."""
    shared_memory: int
    """Free in /dev/shm."""
    disk: int
    """Free where checkpoints go."""
    open_files: int
    """Most files that a process may have open."""


def read_machine(checkpoints: Path) -> FoundMachine:
    """This machine. Without a driver there are no GPUs."""
    gpus = read_gpus()
    return FoundMachine(
        gpus=gpus,
        linked=len(gpus) < 2 or _all_linked(),
        host_memory=available_bytes(),
        shared_memory=_free(SHARED_MEMORY),
        disk=_free(checkpoints),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _free(path: Path) -> int:
    """Free bytes of the file system that `path` is, or would be, on."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free


def _ask(*arguments: str) -> str | None:
    """What nvidia-smi prints; None where there is none, or no driver."""
    if shutil.which(NVIDIA_SMI) is None:
        return None
    try:
        done = subprocess.run([NVIDIA_SMI, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_gpus() -> tuple[FoundGpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES does not hide from this process, as they are now; without a driver there are
    none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return ()
    told = _ask(f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    found = parse_gpus(told) if told is not None else ()
    return tuple(found[number] for number in _visible(visible, len(found))) if visible else found


def _visible(words: str, count: int) -> list[int]:
    """The numbers of the GPUs that CUDA_VISIBLE_DEVICES names, by number or by the beginning of an id; of all, if it
    names what nvidia-smi does not know."""
    told = _ask("--query-gpu=uuid", "--format=csv,noheader") or ""
    ids = [line.strip() for line in told.splitlines()]
    chosen = []
    for word in map(str.strip, words.split(",")):
        if word.isdigit() and int(word) < count:
            chosen.append(int(word))
        elif len(numbers := [number for number, uuid in enumerate(ids) if word and uuid.startswith(word)]) == 1:
            chosen += numbers
        else:
            return list(range(count))
    return chosen


def parse_gpus(told: str) -> tuple[FoundGpu, ...]:
    """The lines of `nvidia-smi --query-gpu`; a field that the driver does not know counts as 0."""
    found = []
    for line in told.strip().splitlines():
        name, total, reserved, used, driver = (field.strip() for field in line.split(","))
        kept = int(reserved) if reserved.isdigit() else 0
        found.append(FoundGpu(name, (int(total) - kept) * MIB, int(used) * MIB, driver))
    return tuple(found)


def _all_linked() -> bool:
    told = _ask("topo", "-m")
    return told is not None and pairs_are_linked(told)


def pairs_are_linked(told: str) -> bool:
    """Whether the matrix of `nvidia-smi topo -m` has NV between every two GPUs."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", told)
    rows = [line.split() for line in plain.splitlines() if re.match(r"GPU\d+\s", line)]
    return all(cell == "X" or cell.startswith("NV") for row in rows for cell in row[1 : len(rows) + 1])
