"""What this machine reaches here and now, beside what data sheets say.

python -m recipe.smoke.rates [--num-gpus N]      prints `Rates` as JSON, measured on all N GPUs at once
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recipe.plan.node import Rates
from recipe.system.errors import run_main
from recipe.system.files import atomic_write_text

MATMUL_SIZE = 8192
ALL_REDUCE_BYTES = 1 << 30
COPY_BYTES = 1 << 30
HOST_ELEMENTS = 256 << 20


def _ms(work: Callable[[], object]) -> float:
    """Milliseconds until a piece of work is done, on a GPU by CUDA events."""
    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def median_ms(work: Callable[[], object], repeats: int = 10, warmup: int = 3) -> float:
    """Median milliseconds of a piece of work, each time from a standstill."""
    for _ in range(warmup):
        work()
    return statistics.median(_ms(work) for _ in range(repeats))


def mean_ms(work: Callable[[], object], repeats: int = 20, warmup: int = 3) -> float:
    """Milliseconds of a piece of work that is done again and again: nobody waits between."""
    for _ in range(warmup):
        work()

    def all_of_it() -> None:
        for _ in range(repeats):
            work()

    return _ms(all_of_it) / repeats


def matmul_limit() -> float:
    """TFLOP/s of a bf16 matrix product of 8192 x 8192 x 8192 on random data."""
    left, right = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * MATMUL_SIZE**3 / median_ms(lambda: left @ right) / 1e9


def host_bandwidth(repeats: int = 5) -> float:
    """See `Rates.host_memory`: the best of some runs, after one to warm up."""
    a, b, c = (torch.ones(HOST_ELEMENTS) for _ in range(3))
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        torch.add(a, b, out=c)
        times.append(time.perf_counter() - began)
    return 3 * a.nbytes / min(times[1:])


def _gpu_bandwidth() -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_ms(lambda: target.copy_(source)) * 1e3


def _bus_bandwidth() -> float:
    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    out = median_ms(lambda: there.copy_(pinned, non_blocking=True), repeats=5, warmup=1)
    back = median_ms(lambda: pinned.copy_(there, non_blocking=True), repeats=5, warmup=1)
    return COPY_BYTES / max(out, back) * 1e3


def _all_reduce_bandwidth(ranks: int) -> float:
    data = torch.zeros(ALL_REDUCE_BYTES, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
    seconds = mean_ms(lambda: dist.all_reduce(data)) / 1e3
    return ALL_REDUCE_BYTES / seconds * 2 * (ranks - 1) / ranks


def _measure_gpu(rank: int, ranks: int, rendezvous: str, result: str) -> None:
    """Measures one GPU of several, in a process of its own; the first one writes the slowest figures."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=ranks, device_id=device)
        dist.barrier()
    found = [matmul_limit() * 1e12, _gpu_bandwidth(), _bus_bandwidth()]
    if ranks > 1:
        found.append(_all_reduce_bandwidth(ranks))
        slowest = torch.tensor(found, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
        found = slowest.tolist()
        dist.destroy_process_group()
    if rank == 0:
        with open(result, "w") as file:
            json.dump(found, file)


def measure(gpus: int) -> Rates:
    """On so many GPUs; 0: the host only."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    host = host_bandwidth()
    if not gpus:
        return Rates(host, gpus=0)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result")
        mp.spawn(_measure_gpu, (gpus, f"file://{folder}/rendezvous", result), nprocs=gpus)
        with open(result) as file:
            return replace(Rates(host, *json.load(file)), gpus=gpus)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.smoke.rates", description="What this machine reaches.")
    parser.add_argument("--num-gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--output", type=Path, help="file to write (default: printed)")
    options = parser.parse_args()
    text = json.dumps(asdict(measure(options.num_gpus)), indent=1)
    print(text) if options.output is None else atomic_write_text(options.output, text + "\n")


if __name__ == "__main__":
    run_main(main)
