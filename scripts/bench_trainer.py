#!/usr/bin/env python3
"""The trainer as the 8-GPU recipe sets it, at the true widths (1 dense and 5 MoE layers) with random weights.

On one GPU, beside transformers' model in the same run: forward and backward over packs of tokens and the optimizer,
each from a standstill, and whole steps one after the other, as training takes them, and as beside an engine, which has
the step's memory between two; as the recipe has it, with Adam on the GPU, and also without recomputation. The peer is
Glm4MoeLiteForCausalLM in bf16 with gradient checkpointing, `grouped_mm` experts, cross-entropy over all tokens and
torch's fused AdamW. Also the bf16 matrix product's limit in this run, peak memory, and with `--parts` where the GPU's
time goes.

With `--gpus N` the recipe on one GPU, and then on N with the experts spread over them (EP N), each with as many packs:
tokens/s a GPU of both, and where the time of each GPU goes: computing, exchanges, waiting for the others, Adam. Ends
with 1 if N GPUs keep less than 85% a GPU of what one does.

    scripts/bench_trainer.py [--tokens 8192] [--sequences 4] [--moe-layers 5] [--skip-peer] [--parts]
    scripts/bench_trainer.py --gpus 2 [--packs 4]
"""

import argparse
import math
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from glm_flash import TINY, environment, write_config
from timeline import Timeline, recorded, show_parts, told
from trainer_ranks import Ranks, alone, build_rank, fill_randomly, recipe_config, step_optimizer

from recipe.config import Architecture, Config
from recipe.messages import TrainSample
from recipe.plan.flops import sequence_cost
from recipe.smoke.rates import matmul_limit, mean_ms, median_ms
from recipe.system.errors import UserError, run_main

if TYPE_CHECKING:
    from recipe.megatron.layout import Rendezvous

KEPT = 0.85
"""Of one GPU's tokens/s, by each of several."""
GPU_ADAM = "--no-optimizer-cpu-offload --no-overlap-cpu-optimizer-d2h-h2d --no-use-precision-aware-optimizer"


@dataclass(frozen=True)
class Measured:
    """Median milliseconds of a forward and backward pass over a step's packs and of the optimizer's step, each alone;
    milliseconds of a whole step among others, and of one from a standstill without torch's memory; peak GiB; and a pass
    in detail."""

    passes_ms: float
    optimizer_ms: float
    step_ms: float
    colocated_ms: float
    peak_gib: float
    timeline: Timeline


@dataclass(frozen=True)
class Load:
    """What every GPU gets for a step: packs of as many sequences of equal length, all prompts different, a fifth of
    each sequence its prompt."""

    tokens: int
    """Of a pack."""
    sequences: int
    """Of a pack."""
    packs: int
    vocabulary: int

    def pack(self, number: int) -> list[TrainSample]:
        """Random tokens, others for every number."""
        draw = np.random.default_rng(number)
        length = self.tokens // self.sequences
        response = length - length // 5
        return [
            TrainSample(
                index=number * self.sequences + place,
                tokens=draw.integers(0, self.vocabulary, length),
                loss_mask=np.ones(response, dtype=np.bool_),
                weight=1 / (self.packs * self.sequences * response),
                mtp_weight=1 / (self.packs * self.sequences * response),
                advantages=draw.normal(size=response).astype(np.float32),
                rollout_log_probs=np.full(response, -12.0, dtype=np.float32),
            )
            for place in range(self.sequences)
        ]

    def of_rank(self, rank: int) -> list[list[TrainSample]]:
        """This rank's packs."""
        return [self.pack(number) for number in range(rank * self.packs, (rank + 1) * self.packs)]


def measure(rendezvous: "Rendezvous", config: Config, load: Load, parts: bool) -> Measured:
    """One rank's part of the steps, and with `parts` where the time goes."""
    from recipe.megatron.step import forward_backward

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.world_size))
    rank = build_rank(config, rendezvous)
    fill_randomly(rank)
    packs = load.of_rank(rendezvous.rank)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def passes() -> None:
        forward_backward(rank.replicas, packs, rank.loss_function)

    def ms_after_an_engine() -> float:
        torch.cuda.empty_cache()
        return median_ms(lambda: rank.train_step(packs), repeats=1, warmup=0)

    # CPU Adam takes seconds.
    repeats = 3 if config.optimizer.optimizer_cpu_offload else 10
    times = (
        median_ms(passes),
        median_ms(lambda: step_optimizer(rank), repeats, warmup=1),
        mean_ms(lambda: rank.train_step(packs), 2 * repeats, warmup=1),
        statistics.median(ms_after_an_engine() for _ in range(repeats)),
    )
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    found = Measured(*times, peak / 2**30, Timeline.of(recorded(passes)[1]))
    if parts:
        show_parts(passes)
        show_parts(lambda: step_optimizer(rank))
    rank.close()
    return found


def measure_peer(folder: Path, tokens: int, sequences: int) -> Measured:
    """transformers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.use_cache = False
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="grouped_mm")
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(0, config.vocab_size, (sequences, tokens // sequences), device="cuda")
    torch.cuda.reset_peak_memory_stats()

    def passes() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    def step() -> None:
        passes()
        optimizer.step()

    times = median_ms(passes), median_ms(optimizer.step), mean_ms(step), math.nan
    return Measured(*times, torch.cuda.max_memory_allocated() / 2**30, Timeline.of([]))


def show_environment() -> float:
    """Prints what this runs on. Returns the matrix product's limit in TFLOP/s."""
    limit = matmul_limit()
    print(f"{environment()}; bf16 matrix product {limit:.0f} TFLOP/s", flush=True)
    return limit


@dataclass(frozen=True)
class Line:
    """What is told of a measurement."""

    what: str
    measured: Measured
    tokens: int
    """Of a step, on each GPU."""
    flops: float
    """Of a step, on each GPU."""
    limit: float
    """TFLOP/s."""

    @property
    def rates(self) -> tuple[float, float]:
        """Tokens/s a GPU of forward and backward passes, and of whole steps."""
        return self.tokens / self.measured.passes_ms * 1e3, self.tokens / self.measured.step_ms * 1e3

    def __str__(self) -> str:
        one, (rate, whole) = self.measured, self.rates
        model = self.flops / one.passes_ms / 1e9
        passes = (
            f"{one.passes_ms:6.1f} ms = {rate:7,.0f} tokens/s, {model:3.0f} model TFLOP/s ({model / self.limit:.0%})"
        )
        step = f"whole steps {one.step_ms:6.1f} ms = {whole:7,.0f} tokens/s"
        if not math.isnan(one.colocated_ms):
            step += f", beside an engine {one.colocated_ms:6.1f} ms"
        step += f"; peak {one.peak_gib:.1f} GiB"
        return f"{self.what:32} forward+backward {passes}; optimizer {one.optimizer_ms:6.1f} ms; {step}"


class Bench:
    """The model in `folder` under `load`."""

    def __init__(self, folder: Path, load: Load, device: str, parts: bool) -> None:
        self.folder, self.load, self.device, self.parts = folder, load, device, parts
        cost = sequence_cost(Architecture.from_checkpoint(folder))
        self.flops = load.packs * load.sequences * cost(load.tokens // load.sequences)
        self.limit = alone(show_environment) if device == "cuda" else float("nan")

    def run(
        self, processes: Ranks, what: str, ranks: int, flags: str, without: Sequence[str] = ()
    ) -> tuple[Line, list[Measured]]:
        """On one of the processes or all of them: the slowest rank, which the others wait for, and all."""
        words = f"--device {self.device} --max-tokens-per-gpu {self.load.tokens} {flags}"
        work = recipe_config(self.folder, ranks, words, without), self.load, self.parts
        found = processes.apart(measure, [work]) if ranks == 1 else processes.together(measure, *work)
        line = self.line(what, max(found, key=lambda one: one.step_ms))
        print(line, flush=True)
        return line, found

    def line(self, what: str, measured: Measured) -> Line:
        return Line(what, measured, self.load.packs * self.load.tokens, self.flops, self.limit)


def beside_transformers(bench: Bench, flags: str, skip_peer: bool) -> int:
    """One GPU."""
    if not skip_peer:
        peer = alone(measure_peer, bench.folder, bench.load.tokens, bench.load.sequences)
        print(bench.line("transformers, checkpointing", peer), flush=True)
    ways: dict[str, tuple[str, list[str]]] = {
        "the recipe": (flags, []),
        "the recipe, Adam on the GPU": (f"{GPU_ADAM} {flags}", []),
        "the same, no recomputation": (f"{GPU_ADAM} {flags}", ["perf.recompute"]),
    }
    for way, (words, without) in ways.items():
        with Ranks(1, bench.device) as process:
            bench.run(process, way, 1, words, without)
    return 0


def beside_one_gpu(bench: Bench, flags: str, gpus: int) -> int:
    """Several GPUs. Returns 1 if they keep too little."""
    with Ranks(gpus, bench.device) as processes:
        one, _ = bench.run(processes, "one GPU", 1, flags)
        several, found = bench.run(processes, f"{gpus} GPUs, EP {gpus}, each", gpus, flags)
    for line in told([measured.timeline for measured in found]):
        print(f"   {line}")
    optimizers = ", ".join(f"{measured.optimizer_ms:.0f} ms" for measured in found)
    print(f"   Adam: {optimizers}; on one GPU {one.measured.optimizer_ms:.0f} ms")
    passes, whole = (ours / alone for ours, alone in zip(several.rates, one.rates, strict=True))
    print(
        f"each of {gpus} GPUs keeps {passes:.1%} of one's tokens/s in forward and backward, {whole:.1%} in whole steps"
    )
    return int(min(passes, whole) < KEPT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8192, help="of a pack")
    parser.add_argument("--sequences", type=int, default=4, help="of a pack")
    parser.add_argument("--packs", type=int, help="of a step on each GPU (default: 1, or 4 with --gpus)")
    parser.add_argument("--moe-layers", type=int, default=5)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--parts", action="store_true", help="show where the GPU's time goes")
    parser.add_argument("--flags", default="", help="further flags of the trainer, over the recipe's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a small model, without a peer")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    if not on_cpu and torch.cuda.device_count() < options.gpus:
        raise UserError(f"--gpus {options.gpus}, but {torch.cuda.device_count()} are here")
    model: dict[str, object] = {"num_nextn_predict_layers": 0} | (TINY if on_cpu else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, options.moe_layers, **model)
        vocabulary = Architecture.from_checkpoint(folder).vocab_size
        packs = options.packs or (1 if options.gpus == 1 else 4)
        load = Load(options.tokens, options.sequences, packs, vocabulary)
        bench = Bench(folder, load, options.device, options.parts)
        if options.gpus == 1:
            return beside_transformers(bench, options.flags, options.skip_peer or on_cpu)
        return beside_one_gpu(bench, options.flags, options.gpus)


if __name__ == "__main__":
    run_main(main)
