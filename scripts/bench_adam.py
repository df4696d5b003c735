#!/usr/bin/env python3
"""CPU Adam: seconds a billion parameters, beside the host memory's and the bus's limit measured in the same run.

A step reads gradient, weight and both moments and writes the last three (28 bytes a parameter of host memory), takes
the fp32 gradient over the bus and sends the bf16 weight back (4 and 2 bytes, at the same time).

    scripts/bench_adam.py [--millions 1000]
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
from glm_flash import environment

from recipe.megatron import adam
from recipe.smoke.rates import host_bandwidth

ADAM_BYTES, OUT_BYTES, BACK_BYTES = 28, 4, 2


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The best of some runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def bus_seconds(parameters: int) -> float:
    """Gradients out and weights back at the same time, pinned."""
    part = min(parameters, 128 << 20)
    out, back = torch.empty(part, device="cuda"), torch.empty(part, device="cuda", dtype=torch.bfloat16)
    pinned_out = torch.empty(part, pin_memory=True)
    pinned_back = torch.empty(part, dtype=torch.bfloat16, pin_memory=True)
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            pinned_out.copy_(out, non_blocking=True)
        with torch.cuda.stream(streams[1]):
            back.copy_(pinned_back, non_blocking=True)

    return seconds(both) * parameters / part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=1000)
    parser.add_argument("--slot-millions", type=float, default=adam.SLOT_ELEMENTS / 1e6, help="elements of a piece")
    options = parser.parse_args()
    count, adam.SLOT_ELEMENTS = options.millions * 1_000_000, int(options.slot_millions * 1e6)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{environment()}, {torch.get_num_threads()} threads")
    bandwidth, bus = host_bandwidth(), bus_seconds(1_000_000_000)
    memory = 1e9 * ADAM_BYTES / bandwidth
    parameter = torch.nn.Parameter(torch.zeros(count, device="cuda", dtype=torch.bfloat16))
    parameter.decoupled_grad = torch.full((count,), 1e-3, device="cuda")  # type: ignore[attr-defined]
    optimizer = adam.MasterAdam([parameter], lr=1e-6, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    optimizer.offload(1.0)
    began = time.perf_counter()
    optimizer.allocate()
    optimizer.begin()
    filled = (time.perf_counter() - began) * 1e9 / count
    ours = seconds(optimizer.step, repeats=3) * 1e9 / count
    print(f"host memory {bandwidth / 1e9:.0f} GB/s: {memory:.3f} s a billion; bus: {bus:.3f} s a billion")
    print(f"state allocated and filled: {filled:.3f} s a billion parameters")
    print(f"CPU Adam: {ours:.3f} s a billion parameters, {ours / max(memory, bus):.2f} times the larger limit")


if __name__ == "__main__":
    main()
