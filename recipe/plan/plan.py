"""The plan of a run: everything that it takes, what does not fit, and the smallest change that would."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from recipe.config import Resolved
from recipe.plan import constants
from recipe.plan.disk import DiskPlan, plan_disk
from recipe.plan.hardware import GB, GIB, Machine
from recipe.plan.layout import Division, divisions
from recipe.plan.lengths import Lengths
from recipe.plan.memory import GpuModel, GpuPlan, HostModel, PhaseMemory, longest_sample
from recipe.plan.shards import Part, part_of, table_of
from recipe.plan.speed import plan_time
from recipe.plan.time_plan import TimePlan


@dataclass(frozen=True)
class Plan:
    """What a run takes on machines of one kind."""

    resolved: Resolved
    machine: Machine
    parameters: dict[Part, int]
    """Parameters of the whole model as the trainer holds it, by part."""
    divisions: tuple[Division, ...]
    longest_sample: int
    """Tokens."""
    pack_tokens: int
    """Tokens of a rank's largest microbatch."""
    model: GpuModel
    gpu: GpuPlan | None
    """None where nothing runs on a GPU."""
    host: tuple[PhaseMemory, ...]
    disk: DiskPlan
    lengths: Lengths
    """Of a rollout's responses,"""
    eval_lengths: Lengths
    """and of an evaluation's."""
    problems: tuple[str, ...]
    """What does not fit, a sentence each."""
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @cached_property
    def time(self) -> TimePlan | None:
        """None where nothing runs on a GPU. Half of all work, and nobody asks for it where the run does not fit."""
        return None if self.gpu is None else plan_time(self.model, self.lengths, self.eval_lengths)


def make_plan(resolved: Resolved, machine: Machine, on_gpu: bool, lengths: Lengths | None = None) -> Plan:
    """The plan of `resolved` on its machines, all like `machine`, with responses of these `lengths`."""
    config = resolved.config
    parameters = dict.fromkeys(Part, 0)
    for name, placement in table_of(resolved.architecture, bool(config.mtp.mtp_num_layers)).items():
        parameters[part_of(name)] += placement.elements * (not placement.is_fp32)
    model = GpuModel.of(resolved, machine, on_gpu)
    eval_cap = config.eval.eval_max_response_len or config.rollout.rollout_max_response_len
    plan = Plan(
        resolved=resolved,
        machine=machine,
        parameters={part: size for part, size in parameters.items() if size},
        divisions=tuple(divisions(resolved)),
        longest_sample=longest_sample(resolved),
        pack_tokens=model.pack.tokens,
        model=model,
        gpu=model.plan() if on_gpu else None,
        host=HostModel.of(resolved, machine, on_gpu).plan(),
        disk=plan_disk(resolved, machine),
        lengths=lengths or usual_lengths(config.rollout.rollout_max_response_len),
        eval_lengths=usual_lengths(eval_cap),
        problems=(),
        warnings=(),
    )
    return replace(plan, problems=tuple(_problems(plan)), warnings=tuple(_warnings(plan)))


def usual_lengths(longest: int) -> Lengths:
    """What is assumed of responses of which none is longer."""
    return Lengths.log_normal(constants.MEAN_RESPONSE * longest, constants.RESPONSE_SPREAD, longest)


def _problems(plan: Plan) -> list[str]:
    problems = []
    if plan.gpu is not None:
        worst = min(plan.gpu.phases, key=lambda one: one.margin)
        if worst.margin < 0:
            problems.append(
                f"a GPU needs {worst.total / GIB:.1f} GiB in {worst.phase} and has {worst.capacity / GIB:.1f} GiB"
            )
        engine = plan.gpu.engine
        if engine is not None and engine.tokens < plan.longest_sample:
            problems.append(
                f"the engine's cache holds {engine.tokens:,} tokens of a GPU, fewer than one sample of "
                f"{plan.longest_sample:,} may have"
            )
    fullest = min(plan.host, key=lambda one: one.margin)
    if fullest.margin < 0:
        problems.append(
            f"a machine needs {fullest.total / GB:.0f} GB of host memory in {fullest.phase} and has "
            f"{fullest.capacity / GB:.0f} GB"
        )
    if not plan.disk.fits:
        assert plan.disk.free is not None
        problems.append(
            f"{plan.disk.kept} checkpoints of {plan.disk.checkpoint / GB:.0f} GB and {plan.disk.records / GB:,.0f} GB "
            f"of samples need {plan.disk.needed / GB:,.0f} GB of disk, and {plan.disk.free / GB:,.0f} GB are free"
        )
    return problems


def _tightest(plan: Plan) -> Iterator[tuple[PhaseMemory, int, str]]:
    """The phase with the smallest margin, on a GPU and on a machine."""
    if plan.gpu is not None:
        yield min(plan.gpu.phases, key=lambda one: one.margin), GIB, "GiB of a GPU are left"
    yield min(plan.host, key=lambda one: one.margin), GB, "GB of host memory are left"


def _warnings(plan: Plan) -> list[str]:
    warnings = []
    for one, unit, name in _tightest(plan):
        if 0 <= one.margin < constants.TIGHT * one.capacity:
            warnings.append(
                f"in {one.phase} {one.margin / unit:.1f} {name}, under {constants.TIGHT:.0%}: some parts of the plan "
                "are assumed, and may take that"
            )
    engine = plan.gpu.engine if plan.gpu is not None else None
    if engine is not None and plan.longest_sample <= engine.tokens < engine.needed_tokens:
        warnings.append(
            f"the engine's cache holds {engine.tokens:,} tokens of a GPU; if all that run at once were "
            f"{plan.longest_sample:,} long it would need {engine.needed_tokens:,}, and SGLang would retract some"
        )
    if plan.disk.free is None and plan.disk.kept > constants.MANY_CHECKPOINTS:
        warnings.append(
            f"without --save-keep the run leaves {plan.disk.saves} checkpoints of "
            f"{plan.disk.checkpoint / GB:.0f} GB each, {plan.disk.needed / GB / 1000:.1f} TB"
        )
    grace, disk = plan.resolved.config.misc.sigterm_grace_s, plan.machine.disk_bandwidth.middle
    if plan.disk.checkpoint / disk > grace:
        warnings.append(
            f"a checkpoint of {plan.disk.checkpoint / GB:.0f} GB takes {plan.disk.checkpoint / disk:.0f} s at "
            f"{disk / GB:.0f} GB/s, and a SIGTERM gives it --sigterm-grace-s {grace:g}: the run would end unsaved"
        )
    if plan.pack_tokens > (plan.resolved.config.perf.max_tokens_per_gpu or plan.pack_tokens):
        warnings.append(
            f"a sample of {plan.longest_sample:,} tokens is longer than --max-tokens-per-gpu: planned with "
            f"{plan.pack_tokens:,} tokens a GPU"
        )
    return warnings
