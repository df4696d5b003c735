#!/usr/bin/env python3
"""The trainer on one GPU at the true widths (1 dense and 5 MoE layers) beside transformers' model in the same run.

One step: forward, backward and optimizer over one pack of tokens, with full recomputation and without; its parts each
from a standstill, and whole steps one after the other, as training takes them. The peer is Glm4MoeLiteForCausalLM in
bf16 with gradient checkpointing, `grouped_mm` experts, cross-entropy over all tokens and torch's fused AdamW. Also the
bf16 matrix product's limit in this run, peak memory, and where the GPU's time goes.

    scripts/bench_trainer.py [--tokens 8192] [--sequences 4] [--moe-layers 5] [--skip-peer] [--parts]
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from glm_flash import CONFIG, environment, write_config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from recipe.config import Architecture, resolve
from recipe.megatron.clipping import clipped_step, gradient_norms
from recipe.megatron.layout import Rendezvous
from recipe.megatron.rank import TrainerRank
from recipe.megatron.step import forward_backward
from recipe.megatron.weights import named_weights
from recipe.messages import TrainSample
from recipe.rates import matmul_limit, mean_ms, median_ms
from recipe.weights.cost import sequence_cost

T = TypeVar("T")
TOP = 90
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PARTS = {
    "attention": ("flash", "cudnn", "fmha", "sdpa"),
    "experts": ("grouped", "group_gemm", "GroupProblem"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "optimizer": ("adam", "Adam"),
    "sort and gather": ("sort", "index", "gather", "scatter", "cumsum"),
    "copies": ("Memcpy", "memcpy", "Memset"),
}


@dataclass(frozen=True)
class Measured:
    """Median milliseconds of a forward and backward pass and of the optimizer's step, each alone; milliseconds of a
    whole step among others; peak GiB."""

    passes_ms: float
    optimizer_ms: float
    step_ms: float
    peak_gib: float


def trainer(folder: Path, flags: str, *, load: bool = False) -> TrainerRank:
    """A rank alone, with the weights of `folder` or random ones."""
    words = f"--hf-checkpoint {folder} --prompt-data /dev/null --rm-type math --num-rollout 1 --rollout-batch-size 1 "
    words += (
        "--n-samples-per-prompt 2 --rollout-max-response-len 1024 --actor-num-gpus-per-node 1 --colocate --lr 1e-6 "
    )
    words += f"--device cuda --use-dynamic-batch-size --max-tokens-per-gpu 8192 --rollout-engine embedded {flags}"
    resolved = resolve(words.split())
    rank = TrainerRank(resolved.config, resolved.architecture, Rendezvous(0, 0, 1, dist.HashStore()))
    if load:
        rank.load()
        return rank
    generator = torch.Generator("cuda").manual_seed(0)
    for name, weight in named_weights(rank.chunks).items():
        with torch.no_grad():
            if name.endswith("expert_bias"):
                weight.zero_()
            elif weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02, generator=generator)
    rank.optimization.begin()
    return rank


def random_pack(tokens: int, sequences: int) -> list[TrainSample]:
    """Sequences of equal length, a fifth of each its prompt, all prompts different."""
    draw = np.random.default_rng(0)
    length = tokens // sequences
    response = length - length // 5
    return [
        TrainSample(
            index=number,
            tokens=draw.integers(0, CONFIG["vocab_size"], length),
            loss_mask=np.ones(response, dtype=np.bool_),
            weight=1 / (sequences * response),
            advantages=draw.normal(size=response).astype(np.float32),
            rollout_log_probs=np.full(response, -12.0, dtype=np.float32),
        )
        for number in range(sequences)
    ]


def measure_ours(folder: Path, pack: list[TrainSample], flags: str, parts: bool) -> Measured:
    """Ours, and with `parts` where the time goes."""
    rank = trainer(folder, flags)
    torch.cuda.reset_peak_memory_stats()

    def passes() -> None:
        forward_backward(rank.replicas, [pack], rank.loss_function)

    def optimizer() -> None:
        norms = gradient_norms(rank.optimization.optimizer)
        clipped_step(rank.optimization.optimizer, norms, rank.config.optimizer.clip_grad)

    times = median_ms(passes), median_ms(optimizer), mean_ms(lambda: rank.train_step([pack]))
    found = Measured(*times, torch.cuda.max_memory_allocated() / 2**30)
    if parts:
        show_parts(passes)
        show_parts(optimizer)
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

    times = median_ms(passes), median_ms(optimizer.step), mean_ms(step)
    return Measured(*times, torch.cuda.max_memory_allocated() / 2**30)


def show_environment() -> float:
    """Prints what this runs on. Returns the matrix product's limit in TFLOP/s."""
    limit = matmul_limit()
    print(f"{environment()}; bf16 matrix product {limit:.0f} TFLOP/s", flush=True)
    return limit


def alone(work: Callable[..., T], *arguments: object) -> T:
    """The result of `work` in a process of its own, which leaves nothing on the GPU."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def show_parts(work: Callable[[], None]) -> None:
    """GPU milliseconds by kind of kernel, where the GPU waits, and the operations that take longest."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], record_shapes=True) as profiler:
        work()
        torch.cuda.synchronize()
    totals: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    kernels = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    end = min(kernel.time_range.start for kernel in kernels)
    for kernel in sorted(kernels, key=lambda one: one.time_range.start):
        named = (part for part, words in PARTS.items() if any(word in kernel.name for word in words))
        totals[next(named, "others")] += kernel.device_time_total / 1e3
        waits[kernel.name] += max(0, kernel.time_range.start - end) / 1e3
        end = max(end, kernel.time_range.end)
    print("    " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in totals.most_common()))
    longest = ", ".join(f"{ms:.2f} before {name[:60]}" for name, ms in waits.most_common(12))
    print(f"    the GPU waits {waits.total():.1f} ms: {longest}")
    operations = profiler.key_averages(group_by_input_shape=True)
    for one in sorted(operations, key=lambda one: -one.self_device_time_total)[:TOP]:
        if one.device_type == DeviceType.CPU:
            ms = one.self_device_time_total / 1e3
            print(f"    {ms:7.2f} ms {one.count:4} x {one.key} {str(one.input_shapes)[:110]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--moe-layers", type=int, default=5)
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--skip-recompute", action="store_true")
    parser.add_argument("--parts", action="store_true", help="show where the GPU's time goes")
    parser.add_argument("--flags", default="", help="further flags of the trainer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, options.moe_layers, num_nextn_predict_layers=0)
        limit = alone(show_environment)
        pack = random_pack(options.tokens, options.sequences)
        architecture = Architecture.from_checkpoint(folder)
        flops = options.sequences * sequence_cost(architecture)(options.tokens // options.sequences)

        def show(what: str, one: Measured) -> None:
            rate, whole = (options.tokens / ms * 1e3 for ms in (one.passes_ms, one.step_ms))
            model = flops / one.passes_ms / 1e9
            passes = (
                f"{one.passes_ms:6.1f} ms = {rate:7,.0f} tokens/s, {model:3.0f} model TFLOP/s ({model / limit:.0%})"
            )
            step = f"whole steps {one.step_ms:6.1f} ms = {whole:7,.0f} tokens/s; peak {one.peak_gib:.1f} GiB"
            print(f"{what:28} forward+backward {passes}; optimizer {one.optimizer_ms:5.1f} ms; {step}", flush=True)

        if not options.skip_peer:
            show("transformers, checkpointing", alone(measure_peer, folder, options.tokens, options.sequences))
        ours = {"ours, no recompute": ""} | ({} if options.skip_recompute else {"ours, full recompute": RECOMPUTE})
        for what, flags in ours.items():
            show(what, alone(measure_ours, folder, pack, f"{flags} {options.flags}", options.parts))


if __name__ == "__main__":
    main()
