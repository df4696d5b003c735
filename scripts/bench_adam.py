#!/usr/bin/env python3
"""CPU Adam: seconds a billion parameters, beside the host memory's and the bus's limit measured in the same run.

A step reads gradient, weight and both moments and writes the last three (28 bytes a parameter of host memory), takes
the fp32 gradient over the bus and sends the bf16 weight back (4 and 2 bytes, at the same time).

`--polling N` starts N processes that keep a core busy each, as SGLang's do beside a trainer that it shares a machine
with; cores without such a process compute, or as many `--threads` as are given. With `--device cpu` only torch's own
AdamW runs, in fp32.

    scripts/bench_adam.py [--millions 1000] [--polling 2] [--threads 16]
    scripts/bench_adam.py --device cpu --millions 100 --polling 1 --threads 2
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from glm_flash import environment

from recipe.megatron import adam
from recipe.smoke.rates import host_bandwidth
from recipe.system.threads import threads_each

ADAM_BYTES, OUT_BYTES, BACK_BYTES = 28, 4, 2


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The best of some runs, after one to warm up."""
    times = []
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(repeats + 1):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
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


@contextmanager
def polling(count: int) -> Iterator[None]:
    """So many processes keep a core busy each while the block runs."""
    command = [sys.executable, "-c", "while True: pass"]
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
        yield


def on_cpu(count: int) -> None:
    """torch's fused AdamW on as many parameters, in pieces as they are on a GPU's host."""
    pieces = torch.zeros(count).split(adam.SLOT_ELEMENTS)
    parameters = [torch.nn.Parameter(piece.clone()) for piece in pieces]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = adam.Adam(parameters, lr=1e-6, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1)
    optimizer.allocate()
    optimizer.begin()
    ours = seconds(optimizer.step, repeats=10) * 1e9 / count
    print(f"AdamW: {ours:.3f} s a billion parameters")


def on_gpu(count: int) -> None:
    """CPU Adam of bf16 parameters on a GPU, and its limits."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, default=1000)
    parser.add_argument("--slot-millions", type=float, default=adam.SLOT_ELEMENTS / 1e6, help="elements of a piece")
    parser.add_argument("--polling", type=int, default=0, help="processes that keep a core busy")
    parser.add_argument("--threads", type=int, help="that compute (default: cores less --polling)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    count, adam.SLOT_ELEMENTS = options.millions * 1_000_000, int(options.slot_millions * 1e6)
    torch.set_num_threads(options.threads or threads_each(1, options.polling))
    name = environment() if options.device == "cuda" else f"torch {torch.__version__}"
    print(f"{name}, {torch.get_num_threads()} threads beside {options.polling} polling processes")
    with polling(options.polling):
        on_cpu(count) if options.device == "cpu" else on_gpu(count)


if __name__ == "__main__":
    main()
