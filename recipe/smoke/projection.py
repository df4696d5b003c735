"""The plan of the 8-GPU recipe with the rates that this node reaches, and of the smoke run itself."""

from collections.abc import Sequence

from recipe.config import Architecture, Resolved
from recipe.config.flags import parse_command_line
from recipe.config.loading import build_config, read_settings, trace_sources
from recipe.plan.hardware import Gpu, Machine
from recipe.plan.machine import FoundMachine
from recipe.plan.node import Rates, machine_as_measured
from recipe.plan.options import PUBLISHED
from recipe.plan.plan import make_plan
from recipe.plan.preflight import plan_here
from recipe.smoke.measured import Projection

RECIPE = "glm4.7-flash-8gpu-mtp"
NODE_GPUS = 8


def read_recipe(flags: Sequence[str]) -> Resolved:
    """A configuration that is planned and not run: without the rules, of which one asks SGLang for seconds."""
    settings = read_settings(parse_command_line(flags))
    config = build_config(settings)
    return Resolved(config, Architecture.from_checkpoint(config.model.hf_checkpoint), trace_sources(settings), ())


def project(found: FoundMachine, gpus: int, kind: Gpu, rates: Rates, price: float) -> Projection:
    """A step of the 8-GPU recipe. Fewer GPUs are taken for their share of a node with eight."""
    resolved = read_recipe(["--recipe", RECIPE, "--hf-checkpoint", str(PUBLISHED)])
    machine = Machine(kind, NODE_GPUS, found.host_memory, found.disk, price=price)
    machine = machine_as_measured(machine, rates)
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
