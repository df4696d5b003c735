"""The plan of the 8-GPU recipe with the rates that this node reaches, and of the smoke run itself."""

from collections.abc import Sequence
from dataclasses import replace

from recipe.config import Architecture, Resolved
from recipe.config.flags import parse_command_line
from recipe.config.loading import build_config, read_settings, trace_sources
from recipe.plan import constants
from recipe.plan.hardware import HOST_BANDWIDTH, Gpu, Machine
from recipe.plan.machine import FoundMachine
from recipe.plan.options import PUBLISHED
from recipe.plan.plan import make_plan
from recipe.plan.preflight import plan_here
from recipe.plan.ranges import Between
from recipe.smoke.measured import Projection
from recipe.smoke.rates import Rates

RECIPE = "glm4.7-flash-8gpu-mtp"
NODE_GPUS = 8
REFERENCE_MATMUL_SHARE = 787 / 989
"""Share of the data sheet's FLOP/s that a matrix product reached on the H200 that the plan's shares of training are
from."""
COPY_SHARE = 0.9
"""Share of the data sheet's bandwidth that a copy within a GPU's memory reaches. Assumed."""


def read_recipe(flags: Sequence[str]) -> Resolved:
    """A configuration that is planned and not run: without the rules, of which one asks SGLang for seconds."""
    settings = read_settings(parse_command_line(flags))
    config = build_config(settings)
    return Resolved(config, Architecture.from_checkpoint(config.model.hf_checkpoint), trace_sources(settings), ())


def gpu_as_measured(kind: Gpu, rates: Rates) -> Gpu:
    """The data sheet's GPU with the figures that would give the plan the measured rates."""
    assert rates.matmul is not None
    assert rates.gpu_memory is not None
    assert rates.bus is not None
    links = kind.link_bandwidth if rates.all_reduce is None else rates.all_reduce / constants.LINK_SHARE
    return replace(
        kind,
        flops=rates.matmul / REFERENCE_MATMUL_SHARE,
        memory_bandwidth=rates.gpu_memory / COPY_SHARE,
        link_bandwidth=links,
        pcie_bandwidth=rates.bus / constants.PCIE_SHARE,
    )


def project(found: FoundMachine, gpus: int, kind: Gpu, rates: Rates, price: float) -> Projection:
    """A step of the 8-GPU recipe. Fewer GPUs are taken for their share of a node with eight."""
    resolved = read_recipe(["--recipe", RECIPE, "--hf-checkpoint", str(PUBLISHED)])
    machine = Machine(
        gpu=gpu_as_measured(kind, rates),
        gpus=NODE_GPUS,
        host_memory=found.host_memory,
        disk=found.disk,
        host_bandwidth=Between.exactly(rates.host_memory),
        price=price,
    )
    if gpus < NODE_GPUS:
        whole = min(HOST_BANDWIDTH.best, rates.host_memory * NODE_GPUS / gpus)
        machine = replace(machine, host_bandwidth=Between.exactly(max(whole, rates.host_memory)))
    plan = make_plan(resolved, machine, on_gpu=True)
    assert plan.time is not None
    return Projection(
        recipe=RECIPE,
        seconds=plan.time.step_s,
        phases={str(work): seconds for work, seconds in plan.time.seconds.items()},
        dollars=plan.time.dollars_a_step,
        price=price,
        problems=plan.problems if gpus == NODE_GPUS else (),
    )


def planned_memory(flags: Sequence[str], found: FoundMachine) -> tuple[int, str]:
    """Bytes of the fullest GPU in the fullest phase of the run with these flags, and the phase."""
    plan = plan_here(read_recipe(flags), found)
    assert plan.gpu is not None
    fullest = max(plan.gpu.phases, key=lambda one: one.total)
    return fullest.total, fullest.phase
