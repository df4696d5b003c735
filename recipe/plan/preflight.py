"""Before a run starts anything: the plan against the machine that is really here."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from recipe.config import Config, Resolved
from recipe.config.engine_placement import engine_gpus_of, gpus_of_fullest_machine
from recipe.config.sglang_machine import problems_on_machine
from recipe.plan import constants
from recipe.plan.hardware import DEFAULT_GPU, GB, GIB, GPUS, Machine
from recipe.plan.machine import FoundMachine, read_machine
from recipe.plan.memory import GpuModel, object_store_bytes
from recipe.plan.plan import Plan, make_plan
from recipe.plan.report import refusal
from recipe.plan.suggest import suggestion
from recipe.system.driver import LEAST_DRIVER
from recipe.system.errors import UserError

logger = logging.getLogger(__name__)

LEAST_OPEN_FILES = 4096
"""Open files that a process may need on a machine with GPUs: Ray's processes, sockets between all ranks, and checkpoint
files. Assumed."""
BUSY = GIB
"""Bytes of a GPU that may be in use; more is somebody else's work."""


@dataclass(frozen=True)
class Finding:
    """Something about this machine that the run will not like."""

    sentence: str
    stops: bool
    """Whether the run cannot go well with it."""


def preflight(resolved: Resolved, *, force: bool) -> Plan | None:
    """The plan of the run on machines like this one; None where this machine is none of the run's. Raises UserError,
    one sentence for everything that is wrong, if the run cannot fit or will fail here; with `force` it is only told."""
    config = resolved.config
    found = read_machine(config.save_dir)
    if "RAY_ADDRESS" in os.environ and not found.gpus and config.cluster.device != "cpu":
        logger.warning("this machine has no GPU and the cluster's others are not looked at: memory is not planned for")
        return None
    plan = plan_here(resolved, found)
    findings = [Finding(refusal(plan, suggestion(plan)), stops=True)] if not plan.fits else []
    findings += [Finding(warning, stops=False) for warning in plan.warnings]
    findings += findings_on(resolved, found)
    if config.cluster.device == "auto":  # else they are rules of the configuration
        problems = problems_on_machine(config, resolved.architecture, on_gpus=uses_gpus(config, found))
        findings += [Finding(problem, stops=True) for problem in problems]
    stopping = [finding.sentence for finding in findings if finding.stops]
    for finding in findings:
        if force or not finding.stops:
            logger.warning("%s", finding.sentence)
    if stopping and not force:
        raise UserError(f"{'; '.join(stopping)} (--force goes on all the same)")
    return plan


def uses_gpus(config: Config, found: FoundMachine) -> bool:
    """Whether the run computes on this machine's GPUs."""
    return config.cluster.device == "cuda" or (config.cluster.device == "auto" and bool(found.gpus))


def plan_here(resolved: Resolved, found: FoundMachine) -> Plan:
    """The plan on machines like this one."""
    return make_plan(resolved, machine_like(resolved, found), uses_gpus(resolved.config, found))


def machine_like(resolved: Resolved, found: FoundMachine) -> Machine:
    """A machine of the run as this one is, its smallest GPU taken for all."""
    smallest = min(found.gpus, key=lambda gpu: gpu.memory).described() if found.gpus else GPUS[DEFAULT_GPU]
    return Machine(
        gpu=smallest,
        gpus=gpus_of_fullest_machine(resolved.config),
        host_memory=found.host_memory,
        disk=found.disk,
    )


def colocated_cache_tokens(resolved: Resolved) -> int:
    """Tokens that the cache of an engine holds on each GPU of this machine, which it shares with the trainer: what
    `mem_fraction_static` leaves of the memory that the trainer never gives back, whichever of the two starts first."""
    found = read_machine(resolved.config.save_dir)
    model = GpuModel.of(resolved, machine_like(resolved, found), on_gpu=True)
    memory = model.engine_memory
    assert memory is not None
    return memory.tokens


def findings_on(resolved: Resolved, found: FoundMachine) -> Iterator[Finding]:
    """What is wrong with the machine itself, apart from what the plan says of memory and disk."""
    config = resolved.config
    if not uses_gpus(config, found):
        return
    yield from _gpus(config, found)
    gpus, of_engine = gpus_of_fullest_machine(config), config.sglang.rollout_num_gpus_per_engine
    needed = object_store_bytes(resolved) + gpus * constants.SHARED_MEMORY_PER_GPU
    if config.needs_engine and of_engine > 1:
        needed += constants.SGLANG_QUEUES * max(1, engine_gpus_of(config, machine=0) // of_engine)
    if found.shared_memory < needed:
        yield Finding(
            f"/dev/shm has {found.shared_memory / GB:.2f} GB free and Ray, NCCL and SGLang need about "
            f"{needed / GB:.1f}: give the container --shm-size or --ipc=host",
            stops=True,
        )
    if found.open_files < LEAST_OPEN_FILES:
        yield Finding(
            f"a process may open {found.open_files} files only, and Ray and NCCL need more: `ulimit -n 65536`, or "
            "--ulimit nofile=65536 for a container",
            stops=True,
        )


def _gpus(config: Config, found: FoundMachine) -> Iterator[Finding]:
    here, needed = len(found.gpus), gpus_of_fullest_machine(config)
    if config.cluster.actor_num_nodes == 1 and "RAY_ADDRESS" in os.environ:
        needed = config.cluster.actor_num_gpus_per_node
    if here < needed:
        engines = needed - config.cluster.actor_num_gpus_per_node
        for_engines = f", {engines} of them for engines" if engines else ""
        or_fewer = " or --rollout-num-gpus" if engines else ""
        yield Finding(
            f"this machine has {here} GPUs and the run needs {needed} of each machine{for_engines}: lower "
            f"--actor-num-gpus-per-node{or_fewer}, or take a larger one",
            stops=True,
        )
    old = {gpu.driver for gpu in found.gpus if _major(gpu.driver) < LEAST_DRIVER}
    if old:
        yield Finding(
            f"NVIDIA's driver here is {min(old)} and CUDA 13 needs {LEAST_DRIVER} or newer: update it, or rent another "
            "machine",
            stops=True,
        )
    busy = [number for number, gpu in enumerate(found.gpus) if gpu.used > BUSY]
    if busy:
        most = max(gpu.used for gpu in found.gpus)
        yield Finding(
            f"GPU {', '.join(map(str, busy))}: up to {most / GIB:.1f} GiB are in use by others; `nvidia-smi` names "
            "the processes",
            stops=True,
        )
    if not found.linked:
        yield Finding("the GPUs of this machine are not all joined by NVLink: exchange will be slow", stops=False)


def _major(driver: str) -> int:
    major = driver.partition(".")[0]
    return int(major) if major.isdigit() else LEAST_DRIVER
