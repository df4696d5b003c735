"""The machines that a plan is made for."""

import re
from dataclasses import dataclass, replace
from typing import Self

from recipe.config.error_text import did_you_mean, listed
from recipe.plan.decode_points import MeasuredDecoding
from recipe.plan.measured_work import MeasuredWork
from recipe.plan.ranges import Between
from recipe.system.errors import UserError

GIB, GB = 2**30, 10**9
HOST_BANDWIDTH, DISK_BANDWIDTH = Between(450e9, 200e9), Between(4e9, 1e9)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: what a process can allocate there, and how fast it is. Bandwidths are one way, in bytes/s."""

    name: str
    memory: int
    """Bytes that the CUDA driver reports as the device's total."""
    flops: float
    """bf16 matrix products, dense, FLOP/s."""
    memory_bandwidth: float
    link_bandwidth: float
    """NVLink, to the other GPUs of the machine."""
    pcie_bandwidth: float
    """To host memory."""


def _gpu(name: str, gib: float, tflops: float, memory_tb: float, link_gb: float, pcie_gb: float) -> Gpu:
    return Gpu(name, int(gib * GIB), tflops * 1e12, memory_tb * 1e12, link_gb * GB, pcie_gb * GB)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("H100-80GB", 79.1, 989, 3.35, 450, 64),
        _gpu("H200-141GB", 139.8, 989, 4.8, 450, 64),
        _gpu("A100-80GB", 79.1, 312, 2.04, 300, 32),
        _gpu("A100-40GB", 39.4, 312, 1.55, 300, 32),
    )
}
"""Rates from NVIDIA's data sheets of the SXM modules (dense bf16; half of the NVLink total; PCIe 5 or 4 x16)."""
DEFAULT_GPU = "H100-80GB"


@dataclass(frozen=True)
class Machine:
    """One of the run's machines, all of which are alike."""

    gpu: Gpu
    gpus: int
    """Those that the run takes there, the engines' among them."""
    host_memory: int
    """Bytes that the run may use."""
    disk: int | None = None
    """Free bytes where checkpoints go; None: not known."""
    host_bandwidth: Between = HOST_BANDWIDTH
    """Bandwidth of host memory, bytes/s: assumed, what programs reach of two sockets' DDR5."""
    network_bandwidth: float = 50e9
    """Between machines, a GPU, bytes/s: one 400 Gbit/s port each, as in the usual 8-GPU machines."""
    disk_bandwidth: Between = DISK_BANDWIDTH
    """Written, bytes/s: assumed, one NVMe disk."""
    price: float = 2.5
    """Dollars a GPU and hour."""
    decoding: tuple[MeasuredDecoding, ...] = ()
    """Engines of the run's model that were measured on such a machine."""
    work: tuple[MeasuredWork, ...] = ()
    """Parts of a step that were."""

    @classmethod
    def described(cls, gpu: str, gpus: int, host_memory: str, disk: str | None, price: float) -> Self:
        """From the command line's words. Raises UserError for those that mean nothing."""
        kind = named_gpu(gpu)
        free = None if disk is None else parse_size(disk, "--disk")
        return cls(kind, gpus, parse_size(host_memory, "--host-memory"), free, price=price)


def named_gpu(name: str) -> Gpu:
    """A kind of GPU by its name here, or H100 for the first of them; NAME=GIB is that kind with other memory. Raises
    UserError."""
    word, _, gib = name.partition("=")
    found = [gpu for known, gpu in GPUS.items() if known == word or known.startswith(f"{word}-")]
    if not found:
        raise UserError(f"--gpu {name} is not known{did_you_mean(name, GPUS)} (known: {listed(GPUS)})")
    if not gib:
        return found[0]
    try:
        return replace(found[0], name=name, memory=int(float(gib) * GIB))
    except ValueError as error:
        raise UserError(f"--gpu {name}: what follows = is the memory in GiB, a number") from error


def parse_size(text: str, flag: str) -> int:
    """Bytes of `1TB`, `900 GB`, `512GiB`. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"{flag} {text} is no size; write 1TB, 900GB or 512GiB")
    number, unit, binary = match.groups()
    if text.strip() == number:
        raise UserError(f"{flag} {number} has no unit: write {number}GB, say")
    scale = _UNITS[unit.upper()]
    return int(float(number) * (1024 ** list(_UNITS).index(unit.upper()) if binary else scale))
