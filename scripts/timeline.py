"""Where a GPU's time goes, from torch's profiler: kernels, exchanges with other GPUs, and waiting."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

TOP = 90
PARTS = {
    "attention": ("flash", "cudnn", "fmha", "sdpa"),
    "exchanges": ("nccl",),
    "experts": ("grouped", "group_gemm", "GroupProblem"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "optimizer": ("adam", "Adam"),
    "sort and gather": ("sort", "index", "gather", "scatter", "cumsum"),
    "copies": ("Memcpy", "memcpy", "Memset"),
}
ALL_TO_ALL = "SendRecv"
"""In the name of the kernel by which NCCL sends each rank its own part."""


@dataclass(frozen=True)
class Kernel:
    """On one GPU; microseconds since some moment."""

    name: str
    start: float
    end: float

    @property
    def is_exchange(self) -> bool:
        return "nccl" in self.name

    @property
    def ms(self) -> float:
        return (self.end - self.start) / 1e3


def recorded(work: Callable[[], object], *, with_shapes: bool = False) -> tuple[profile, list[Kernel]]:
    """The profile of `work`, and its kernels by their start; none without a GPU. With shapes the process is slower."""
    activities = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    if with_shapes or not activities:
        activities.append(ProfilerActivity.CPU)
    with profile(activities=activities, record_shapes=with_shapes) as profiler:
        work()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    kernels = [Kernel(event.name, event.time_range.start, event.time_range.end) for event in events]
    return profiler, sorted(kernels, key=lambda kernel: kernel.start)


def covered_ms(kernels: Sequence[Kernel]) -> float:
    """Milliseconds in which at least one of them runs; they are sorted by their start."""
    total, end = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.end - max(end, kernel.start))
        end = max(end, kernel.end)
    return total / 1e3


@dataclass(frozen=True)
class Timeline:
    """Of one GPU, in milliseconds, from the first kernel's start to the last one's end."""

    whole: float
    computing: float
    exchanging_alone: float
    """While nothing else ran."""
    idle: float
    exchanges: dict[str, list[float]]
    """How long each lasts, in their order by name. One that waits for other ranks lasts until these have come."""

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> "Timeline":
        whole = (max(kernel.end for kernel in kernels) - kernels[0].start) / 1e3 if kernels else 0.0
        computing = covered_ms([kernel for kernel in kernels if not kernel.is_exchange])
        busy = covered_ms(kernels)
        exchanges: dict[str, list[float]] = defaultdict(list)
        for kernel in kernels:
            if kernel.is_exchange:
                exchanges[kernel.name].append(kernel.ms)
        return cls(whole, computing, busy - computing, whole - busy, dict(exchanges))


def told(timelines: Sequence[Timeline]) -> list[str]:
    """A line a rank. Of an exchange in which all ranks take part, the last to come shows what the transfer takes; the
    rest of the others' time is waiting."""
    transfers = {
        name: [min(durations) for durations in zip(*(one.exchanges.get(name, []) for one in timelines), strict=False)]
        for name in dict.fromkeys(name for one in timelines for name in one.exchanges)
    }
    rows = sum(sum(durations) for name, durations in transfers.items() if ALL_TO_ALL in name)
    others = sum(map(sum, transfers.values())) - rows
    lines = []
    for rank, one in enumerate(timelines):
        waiting = sum(map(sum, one.exchanges.values())) - rows - others
        lines.append(
            f"rank {rank}: {one.whole:.1f} ms: {one.computing:.1f} computing, {one.exchanging_alone:.1f} with nothing "
            f"but exchanges, {one.idle:.1f} idle; exchanges: {rows:.1f} of rows, {others:.1f} of gradients and counts, "
            f"{waiting:.1f} waiting for the others"
        )
    return lines


def show_parts(work: Callable[[], object]) -> None:
    """GPU milliseconds by kind of kernel, where the GPU waits, and the operations that take longest."""
    profiler, kernels = recorded(work, with_shapes=True)
    totals: dict[str, float] = defaultdict(float)
    waits: dict[str, float] = defaultdict(float)
    end = kernels[0].start if kernels else 0.0
    for kernel in kernels:
        named = (part for part, words in PARTS.items() if any(word in kernel.name for word in words))
        totals[next(named, "others")] += kernel.ms
        waits[kernel.name] += max(0.0, kernel.start - end) / 1e3
        end = max(end, kernel.end)
    print("    " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in _longest_first(totals)))
    longest = ", ".join(f"{ms:.2f} before {name[:60]}" for name, ms in _longest_first(waits)[:12])
    print(f"    the GPU waits {sum(waits.values()):.1f} ms: {longest}")
    operations = profiler.key_averages(group_by_input_shape=True)
    for one in sorted(operations, key=lambda one: -one.self_device_time_total)[:TOP]:
        if one.device_type == DeviceType.CPU:
            ms = one.self_device_time_total / 1e3
            print(f"    {ms:7.2f} ms {one.count:4} x {one.key} {str(one.input_shapes)[:110]}")


def _longest_first(totals: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(totals.items(), key=lambda one: -one[1])
