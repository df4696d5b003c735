"""What a smoke run ends with: a table of what it measured, and the verdict."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from recipe.plan.hardware import GB, GIB
from recipe.plan.ranges import range_text
from recipe.smoke.measured import Measured
from recipe.smoke.verdict import LEAST_AFTER, MOST_BEFORE, MOST_LOGPROB_DIFF

NOT_ON_A_CPU = "not on a CPU"
NOT_MEASURED = "not measured"


class Row(NamedTuple):
    """A line of the table."""

    what: str
    value: str


def rows(measured: Measured) -> list[Row]:
    """The table."""
    return [*_node(measured), *_rates(measured), *_loop(measured), *_projection(measured)]


def _missing(measured: Measured, *, needs_gpu: bool = False) -> str:
    return NOT_ON_A_CPU if needs_gpu and not measured.gpus else NOT_MEASURED


def _node(measured: Measured) -> Iterator[Row]:
    machine = measured.machine
    if not measured.gpus:
        for what in ("GPUs", "driver", "links"):
            yield Row(what, NOT_ON_A_CPU)
        return
    first = machine.gpus[0]
    of = f" of {len(machine.gpus)}" if len(machine.gpus) > measured.gpus else ""
    yield Row("GPUs", f"{measured.gpus}{of} x {first.name}, {first.memory / GIB:.1f} GiB")
    yield Row("driver", first.driver)
    linked = "NVLink between all" if machine.linked else "not all joined by NVLink"
    yield Row("links", linked if len(machine.gpus) > 1 else "one GPU")


def _rates(measured: Measured) -> Iterator[Row]:
    rates, kind = measured.rates, measured.kind
    names = "NCCL all-reduce", "bf16 matmul", "GPU memory", "host to GPU and back"
    if rates is None or kind is None:
        yield from (Row(name, _missing(measured, needs_gpu=True)) for name in names)
    else:
        reached = rates.all_reduce, rates.matmul, rates.gpu_memory, rates.bus
        sheet = kind.link_bandwidth, kind.flops, kind.memory_bandwidth, kind.pcie_bandwidth
        for name, value, most in zip(names, reached, sheet, strict=True):
            unit, spelled = (1e12, "TFLOP/s") if most == kind.flops else (GB, "GB/s")
            share = "" if value is None else f"{value / unit:.0f} {spelled}, {value / most:.0%} of the data sheet's"
            yield Row(name, share or "one GPU")
    yield Row("host memory", NOT_MEASURED if rates is None else f"{rates.host_memory / GB:.0f} GB/s")


def _loop(measured: Measured) -> Iterator[Row]:
    memory, learning, interruption = measured.memory, measured.learning, measured.interruption
    text = _missing(measured, needs_gpu=True)
    if memory is not None:
        share = memory.measured / memory.planned - 1
        text = f"{memory.planned / GIB:.1f} GiB a GPU planned ({memory.phase}), {memory.measured / GIB:.1f} measured"
        text += f" ({share:+.1%})"
    yield Row("memory", text)
    first = measured.first_token_s
    yield Row("first token", NOT_MEASURED if first is None else f"{first:.0f} s after the command")
    values = dict.fromkeys(("weight update", "train/rollout difference", "acceptance length", "learned"), NOT_MEASURED)
    if learning is not None:
        after = NOT_MEASURED if learning.after is None else f"{learning.after:.3f}"
        values = {
            "weight update": f"{learning.update_s:.2f} s of a step of {learning.step_s:.2f} s",
            "train/rollout difference": f"{learning.logprob_diff_mean:.2g} nats a token (at most {MOST_LOGPROB_DIFF}), "
            f"k3 KL {learning.logprob_kl:.2g}",
            "acceptance length": _missing(measured, needs_gpu=True)
            if learning.accept_length is None
            else f"{learning.accept_length:.2f} tokens a verification ({learning.first_accept_length:.2f} at first)",
            "learned": f"held-out {learning.before:.3f} (at most {MOST_BEFORE}) to {after} (at least {LEAST_AFTER}) in "
            f"{learning.steps} steps",
        }
    yield from (Row(what, value) for what, value in values.items())
    text = NOT_MEASURED
    if interruption is not None:
        text = f"SIGTERM after step {interruption.step}: status {interruption.status} in {interruption.save_s:.1f} s"
        text += ", went on without a step lost or repeated" if interruption.goes_on else ", did not go on"
    yield Row("interruption and resume", text)


def _projection(measured: Measured) -> Iterator[Row]:
    projection = measured.projection
    text = _missing(measured, needs_gpu=True)
    if projection is not None:
        phases = ", ".join(f"{work} {range_text(seconds)}" for work, seconds in projection.phases.items())
        price = f"${range_text(projection.dollars)} at ${projection.price:g} a GPU hour"
        text = f"{range_text(projection.seconds)} s ({phases}), {price}"
    yield Row("a step of 8gpu-mtp here", text)
    seconds = measured.seconds or {}
    parts = ", ".join(f"{part} {value:.0f}" for part, value in seconds.items())
    yield Row("this took", f"{sum(seconds.values()):.0f} s ({parts})" if seconds else NOT_MEASURED)


def render(table: Sequence[Row], reasons: Sequence[str]) -> str:
    """The table as text, the verdict last."""
    width = max(len(row.what) for row in table)
    lines = [f"  {row.what:<{width}}  {row.value}" for row in table]
    return "\n".join([*lines, "", verdict(reasons)])


def verdict(reasons: Sequence[str]) -> str:
    """One sentence."""
    return f"this node is not good: because {'; '.join(reasons)}" if reasons else "this node is good"
