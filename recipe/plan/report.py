"""The plan as a page for a terminal, and as JSON."""

import json
import math
from collections.abc import Iterator, Sequence

from recipe.plan.generation import prompts_of
from recipe.plan.hardware import GB, GIB
from recipe.plan.memory import PhaseMemory, Use
from recipe.plan.plan import Plan
from recipe.plan.ranges import Between, range_text
from recipe.plan.suggest import Change
from recipe.plan.time_plan import TimePlan, Work
from recipe.run.statistics import smallest_gain

SCHEMA_VERSION = 2
SCHEMA = {
    "schema": "2; grows when a field changes its meaning or goes",
    "name": "of the run",
    "fits": "whether anything is refused",
    "problems": "what does not fit, a sentence each",
    "warnings": "what fits and deserves a thought",
    "suggestion": "flags with which it fits, the fewest and mildest; [] if it fits or nothing tried helps",
    "machine": "what was planned for: gpu, gpus a machine, machines, gpu_memory and host_memory in bytes",
    "parameters": "of the whole model in the trainer, by part",
    "longest_sample": "tokens of the longest prompt and response",
    "pack_tokens": "tokens of the largest microbatch of a rank",
    "divisions": "what the layout divides: what, size, over, parts, each, and the valid values of parts",
    "gpu": "the fullest GPU by phase: bytes by use, total, capacity, margin; null without GPUs",
    "host": "the fullest machine by phase, in the same form",
    "cache_tokens": "tokens that the engine's cache holds on a GPU; null without an engine",
    "needed_cache_tokens": "tokens of all that runs at once on a GPU, were it as long as can be",
    "disk": "bytes: checkpoint, records (samples and tokens), needed, free (null: not known); saves and kept are "
    "numbers of checkpoints",
    "gains_shown": "share of right answers more, by evaluation set, that is found with 80% power",
    "colocated": "of a run whose engines have GPUs of their own: name, and [best, worst] of step_s, dollars_a_step and "
    "run_dollars, of the recipe that it extends which has as many GPUs and shares them; null where there is none",
    "time": "null without GPUs; else, each [best, worst]: seconds of a step by phase, step_s (where rollouts are "
    "generated beside training, the slower side's), dollars_a_step, tail_s (of the rollout's, with less than a "
    "quarter of the sequences at once), evaluation_s (of one), run_hours and run_dollars (all steps and "
    "evaluations), tokens_per_s by phase; evaluations, their number; and sides: of trainer and engines, where they "
    "share no GPUs, the number of these (gpus), the seconds of a step in which they are busy, and the share in which "
    "they are idle",
}
"""Every field of the JSON."""

OF_TOKENS = Work.ROLLOUT, Work.LOG_PROBS, Work.TRAIN
"""Kinds of work that go by tokens; the others may take no time at all."""


def as_json(plan: Plan, changes: Sequence[Change], colocated: Plan | None = None) -> str:
    """One object, in the fields of SCHEMA."""
    machine, time, disk = plan.machine, plan.time, plan.disk
    engine = plan.gpu.engine if plan.gpu is not None else None
    document = {
        "schema": SCHEMA_VERSION,
        "name": plan.resolved.config.misc.name,
        "fits": plan.fits,
        "problems": plan.problems,
        "warnings": plan.warnings,
        "suggestion": [change.flags for change in changes],
        "machine": {
            "gpu": machine.gpu.name if plan.gpu is not None else None,
            "gpus": machine.gpus,
            "machines": plan.resolved.config.cluster.actor_num_nodes,
            "gpu_memory": machine.gpu.memory if plan.gpu is not None else None,
            "host_memory": machine.host_memory,
        },
        "parameters": plan.parameters,
        "longest_sample": plan.longest_sample,
        "pack_tokens": plan.pack_tokens,
        "divisions": [vars(division) for division in plan.divisions],
        "gpu": None if plan.gpu is None else {one.phase: _phase(one) for one in plan.gpu.phases},
        "host": {one.phase: _phase(one) for one in plan.host},
        "cache_tokens": None if engine is None else engine.tokens,
        "needed_cache_tokens": None if engine is None else engine.needed_tokens,
        "disk": {
            "checkpoint": disk.checkpoint,
            "saves": disk.saves,
            "kept": disk.kept,
            "records": disk.records,
            "needed": disk.needed,
            "free": disk.free,
        },
        "gains_shown": gains_shown(plan),
        "colocated": None if colocated is None else _compared(colocated),
        "time": None if time is None else _time(time),
    }
    return json.dumps(document, indent=2)


def _ends(found: Between) -> list[float]:
    return [found.best, found.worst]


def _compared(plan: Plan) -> dict[str, object]:
    assert plan.time is not None
    return {
        "name": plan.resolved.config.misc.name,
        "step_s": _ends(plan.time.step_s),
        "dollars_a_step": _ends(plan.time.dollars_a_step),
        "run_dollars": _ends(plan.time.dollars),
    }


def _time(time: TimePlan) -> dict[str, object]:
    return {
        "seconds": {work: _ends(seconds) for work, seconds in time.seconds.items()},
        "sides": {
            side: {"gpus": one.gpus, "seconds": _ends(one.seconds), "idle": _ends(one.idle)}
            for side, one in time.sides.items()
        },
        "step_s": _ends(time.step_s),
        "dollars_a_step": _ends(time.dollars_a_step),
        "tail_s": _ends(time.tail),
        "evaluation_s": _ends(time.evaluation),
        "evaluations": time.evaluations,
        "run_hours": _ends(time.hours),
        "run_dollars": _ends(time.dollars),
        "tokens_per_s": {work: _ends(time.tokens_per_s(work)) for work in OF_TOKENS if work in time.seconds},
    }


def _phase(one: PhaseMemory) -> dict[str, object]:
    return {"uses": one.uses, "total": one.total, "capacity": one.capacity, "margin": one.margin}


def page(plan: Plan, changes: Sequence[Change]) -> str:
    """Some forty lines, the verdict last."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_rest(plan), "", *_verdict(plan, changes)])


def _head(plan: Plan) -> Iterator[str]:
    config, machine = plan.resolved.config, plan.machine
    total = sum(plan.parameters.values())
    where = f"{config.cluster.actor_num_nodes} x {machine.gpus} {machine.gpu.name}"
    if plan.time is not None and plan.time.engine_gpus:
        where += f" ({config.world_size} train, {plan.time.engine_gpus} generate)"
    if plan.gpu is None:
        where = f"{config.world_size} ranks without a GPU"
    memory = f"{machine.host_memory / GB:,.0f} GB of host memory"
    yield f"{config.misc.name}: {_count(total)} parameters on {where}, {memory}"
    yield ""
    for one in plan.divisions:
        each = one.each if "+" in one.each else f"{one.each} each"
        over = f"{one.over} {one.parts}"
        yield f"  {one.size:>6} {one.what:<15} / {over:<14} = {each:<10} valid: {_numbers(one.valid)}"


def _numbers(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def _count(number: float) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f}"


def _memory(plan: Plan) -> Iterator[str]:
    if plan.gpu is not None:
        yield from _table("GiB of a GPU", plan.gpu.phases, GIB)
        yield ""
    small = max(one.total for one in plan.host) < 20 * GB
    yield from _table("GB of a machine", plan.host, GB, digits=2 if small else 0)


def _table(title: str, phases: Sequence[PhaseMemory], unit: int, digits: int = 1) -> Iterator[str]:
    """A line a use, a column a phase."""
    width = 14
    yield f"  {title:<22}" + "".join(f"{one.phase:>{width}}" for one in phases)
    for use in Use:
        if any(use in one.uses for one in phases):
            cells = (f"{one.uses[use] / unit:.{digits}f}" if use in one.uses else "" for one in phases)
            yield f"    {use:<20}" + "".join(f"{cell:>{width}}" for cell in cells).rstrip()
    for name, values in (
        ("total", [one.total for one in phases]),
        ("there is", [one.capacity for one in phases]),
        ("margin", [one.margin for one in phases]),
    ):
        yield f"    {name:<20}" + "".join(f"{value / unit:>{width}.{digits}f}" for value in values)


def _rest(plan: Plan) -> Iterator[str]:
    disk, time = plan.disk, plan.time
    free = "" if disk.free is None else f"; {disk.free / GB:,.0f} GB free"
    each = f"{disk.checkpoint / GB:,.0f} GB" if disk.checkpoint > GB else f"{disk.checkpoint / 1e6:,.0f} MB"
    needed = f"{disk.needed / GB:,.0f} GB" if disk.needed > GB else f"{disk.needed / 1e6:,.0f} MB"
    records = f", and {disk.records / GB:,.0f} GB of samples" if disk.records > GB else ""
    yield f"  disk: {disk.kept} checkpoints at once, {each} each{records}: {needed}{free}"
    if plan.gpu is not None and (engine := plan.gpu.engine) is not None:
        yield f"  cache: {engine.tokens:,} tokens a GPU; what runs at once needs {engine.needed_tokens:,} at most"
    if time is not None:
        yield from seconds_and_dollars(time)
    for name, found in gains_shown(plan).items():
        yield f"  a gain on {name} shows from {100 * found:.1f} points on, if its problems gain alike (80% power)"


def gains_shown(plan: Plan) -> dict[str, float]:
    """The smallest gain that each evaluation set can show, as a share; see `smallest_gain`."""
    settings = plan.resolved.config.eval
    samples = settings.n_samples_per_eval_prompt
    found = {data.name: smallest_gain(prompts_of(data.path), samples) for data in settings.eval_prompt_data}
    return {name: gain for name, gain in found.items() if math.isfinite(gain)}


def seconds_and_dollars(time: TimePlan) -> Iterator[str]:
    """A step's time by kind of work, and what the run costs."""
    rates = {work: range_text(time.tokens_per_s(work)) for work in OF_TOKENS if work in time.seconds}
    price = f"${range_text(time.dollars_a_step)} at ${time.price:g} a GPU hour"
    yield f"  {'seconds of a step':<22}{range_text(time.step_s):>14}   {price}"
    for work, seconds in time.seconds.items():
        notes = [f"{rates[work]} tokens/s"] if work in rates else []
        if work is Work.ROLLOUT and time.tail.worst > 0:
            notes.append(f"{range_text(time.tail)} s of it with less than a quarter of the sequences")
        yield f"    {work:<20}{range_text(seconds):>14}   {', '.join(notes)}".rstrip()
    for side, one in time.sides.items():
        idle = range_text(one.idle * 100)
        yield f"    {f'{side} busy':<20}{range_text(one.seconds):>14}   {one.gpus} GPUs, {idle}% of the step idle"
    run = f"{time.rollouts:,} steps"
    if time.evaluations:
        run += f" and {time.evaluations:,} evaluations of {range_text(time.evaluation)} s"
    yield f"  {run}: {range_text(time.hours)} hours, ${range_text(time.dollars)}"


def comparison(plan: Plan, colocated: Plan) -> str:
    """What the run costs beside a colocated one on as many GPUs, in a sentence."""
    time = colocated.time
    assert plan.time is not None
    assert time is not None
    saved = 1 - plan.time.dollars.middle / time.dollars.middle
    return (
        f"{colocated.resolved.config.misc.name}, colocated on as many GPUs, takes {range_text(time.step_s)} s and "
        f"${range_text(time.dollars_a_step)} a step, ${range_text(time.dollars)} in all: by the plan this one costs "
        f"{abs(saved):.0%} {'less' if saved > 0 else 'more'}."
    )


def _verdict(plan: Plan, changes: Sequence[Change]) -> Iterator[str]:
    for warning in plan.warnings:
        yield f"note: {warning}"
    if not plan.fits:
        yield refusal(plan, changes)
        return
    margins = [f"{min(one.margin for one in plan.host) / GB:,.0f} GB of each machine's memory"]
    if plan.gpu is not None:
        margins.insert(0, f"{min(one.margin for one in plan.gpu.phases) / GIB:.1f} GiB of every GPU")
    yield f"It fits: at the tightest moment {' and '.join(margins)} are left."


def refusal(plan: Plan, changes: Sequence[Change]) -> str:
    """One sentence: what does not fit, and what would."""
    what = "; ".join(plan.problems)
    if not changes:
        return f"It does not fit: {what}; no change of a few flags mends that: use more or larger machines"
    return f"It does not fit: {what}; it does with {' '.join(change.flags for change in changes)}"
