"""What a rented node was measured to reach, and the machine that the plan takes it for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from recipe.plan import constants
from recipe.plan.decode_points import MeasuredDecoding
from recipe.plan.hardware import HOST_BANDWIDTH, Gpu, Machine
from recipe.plan.measured_work import MeasuredWork
from recipe.plan.ranges import Between
from recipe.system.errors import UserError
from recipe.system.json_text import read_json

REFERENCE_MATMUL_SHARE = 787 / 989
"""Share of the data sheet's FLOP/s that a matrix product reached on the H200 that the plan's shares of training are
from."""
COPY_SHARE = 0.9
"""Share of the data sheet's bandwidth that a copy within a GPU's memory reaches. Assumed."""


@dataclass(frozen=True)
class Rates:
    """In FLOP/s and bytes/s; of several GPUs, the slowest one's. None: there is no GPU, or only one."""

    host_memory: float
    """c = a + b on large fp32 tensors by all cores, reads and writes counted."""
    matmul: float | None = None
    """Product of two bf16 matrices."""
    gpu_memory: float | None = None
    """A copy within a GPU's memory, reads and writes counted."""
    bus: float | None = None
    """Between pinned host memory and a GPU, while all GPUs copy; the slower direction."""
    all_reduce: float | None = None
    """Bus bandwidth of NCCL's all-reduce of 1 GiB: 2 (N - 1) / N of it over its time."""
    gpus: int | None = None
    """That were measured; None: it is not known."""
    decoding: tuple[MeasuredDecoding, ...] = ()
    """Engines that were measured, as `make tune MEASURE=1` does."""
    work: tuple[MeasuredWork, ...] = ()
    """Parts of a step that it measured, beside what the plan has for them by the rates above."""

    __pydantic_config__ = ConfigDict(extra="forbid")


def read_rates(path: Path) -> Rates:
    """Those that `python -m recipe.smoke.rates --output FILE`, or a smoke run, has written. Raises UserError."""
    cure = "name the rates.json of a smoke run, or what python -m recipe.smoke.rates writes"
    found = read_json(path, dict[str, Any], cure)
    try:
        return TypeAdapter(Rates).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path} does not hold a node's rates ({where}: {first['msg']}): {cure}") from error


def gpu_as_measured(kind: Gpu, rates: Rates) -> Gpu:
    """The data sheet's GPU with the figures that would give the plan the measured rates, as far as there are any."""
    return replace(
        kind,
        flops=kind.flops if rates.matmul is None else rates.matmul / REFERENCE_MATMUL_SHARE,
        memory_bandwidth=kind.memory_bandwidth if rates.gpu_memory is None else rates.gpu_memory / COPY_SHARE,
        link_bandwidth=kind.link_bandwidth if rates.all_reduce is None else rates.all_reduce / constants.LINK_SHARE,
        pcie_bandwidth=kind.pcie_bandwidth if rates.bus is None else rates.bus / constants.PCIE_SHARE,
    )


def machine_as_measured(machine: Machine, rates: Rates) -> Machine:
    """`machine` with the rates of a node: where fewer GPUs were measured than it has, the node's host memory is taken
    for their share."""
    whole = min(HOST_BANDWIDTH.best, rates.host_memory * machine.gpus / max(1, rates.gpus or machine.gpus))
    host = max(whole, rates.host_memory)
    gpu = gpu_as_measured(machine.gpu, rates)
    host_bandwidth = Between.exactly(host)
    return replace(machine, gpu=gpu, host_bandwidth=host_bandwidth, decoding=rates.decoding, work=rates.work)
