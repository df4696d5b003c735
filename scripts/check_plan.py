#!/usr/bin/env python3
"""The plan's GPU memory beside what one GPU measures, on 1 dense and 5 MoE layers at the true widths.

For the 8-GPU recipe and for other ways of training: what the trainer holds at rest, the peak of a forward and backward
pass, of the log-prob pass and of an optimizer step, and what the process takes outside torch's allocator. Ends with 1
if the plan's peak is more than 5% off.

    scripts/check_plan.py [--tokens 8192] [--sequences 4] [--moe-layers 5] [--way MTP]
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from glm_flash import environment, write_config
from trainer_ranks import RECOMPUTE, alone, plain_config, rank_alone, recipe_config, step_optimizer

from recipe.config import Architecture, Config, Resolved
from recipe.megatron.rank import TrainerRank
from recipe.megatron.step import forward_backward, response_scores
from recipe.messages import TrainSample
from recipe.plan.activations import Pack
from recipe.plan.hardware import DEFAULT_GPU, GIB, Machine
from recipe.plan.memory import GpuModel, Use
from recipe.smoke.random_model import Load

TOLERANCE = 0.05
FUSED = "--moe-permute-fusion"
WAYS = {
    "no recomputation": FUSED,
    "full recomputation": f"{FUSED} {RECOMPUTE}",
    "full, flash attention, megatron's permutation": f"{RECOMPUTE} --attention-backend flash",
    "full, small chunks of logits": f"{FUSED} {RECOMPUTE} --log-probs-chunk-size 1024",
    "full, MTP trained": f"{FUSED} {RECOMPUTE} --mtp-num-layers 1 --enable-mtp-training",
    "full, CPU Adam for half": f"{FUSED} {RECOMPUTE} --optimizer-cpu-offload --optimizer-offload-fraction 0.5",
}


@dataclass(frozen=True)
class Row:
    """Bytes at one moment."""

    moment: str
    measured: int
    planned: int

    @property
    def error(self) -> float:
        """The plan's share too much."""
        return self.planned / self.measured - 1


def predicted(rank: TrainerRank, pack: Pack) -> tuple[int, int]:
    """The plan's bytes of what is held, and at the peak of a step."""
    resolved = Resolved(rank.config, rank.architecture, {}, ())
    machine = Machine.described(DEFAULT_GPU, 1, "1TB", None, 0.0)
    model = GpuModel(resolved, machine, on_gpu=True, pack=pack)
    [shard] = model.shards
    computing = model.computing(shard)
    print(
        "   planned: " + ", ".join(f"{use} {size / GIB:.2f}" for use, size in (model.held(shard) | computing).items())
    )
    held = sum(model.held(shard).values())
    return held, held + computing[Use.ACTIVATIONS] + computing[Use.LOG_PROBS]


def ways(folder: Path, tokens: int) -> dict[str, Config]:
    """Of training the model in `folder`."""
    recipe = recipe_config(folder, 1, f"--device cuda --max-tokens-per-gpu {tokens}")
    return {"the recipe": recipe} | {way: plain_config(folder, flags) for way, flags in WAYS.items()}


def measure(config: Config, samples: list[TrainSample]) -> list[Row]:
    """What one way of training takes, for a process of its own."""
    rank = rank_alone(config)
    lengths = [sample.length for sample in samples]
    asked = sum(sample.response_length for sample in samples)
    pack = Pack(tokens=sum(lengths), asked=asked, longest=max(lengths), keys=sum(lengths))
    held, peak = predicted(rank, pack)
    torch.cuda.empty_cache()
    rows = [Row("at rest", torch.cuda.memory_allocated(), held)]

    def peak_of(work: Callable[[], object]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    passes = peak_of(lambda: forward_backward(rank.replicas, [samples], rank.loss_function))
    rows.append(Row("forward and backward", passes, peak))
    reserved = torch.cuda.max_memory_reserved()
    step = peak_of(lambda: step_optimizer(rank))
    rows.append(Row("optimizer step", step, held))
    log_probs = peak_of(lambda: response_scores(rank.chunks, [samples]))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()
    print(
        f"   log-prob pass {log_probs / GIB:.2f} GiB; torch reserved {reserved / GIB:.2f} GiB at the peak, "
        f"{reserved / passes - 1:.1%} more than it used; outside torch {outside / GIB:.2f} GiB"
    )
    rank.close()
    return rows


def show_environment() -> None:
    print(environment(), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--moe-layers", type=int, default=5)
    parser.add_argument("--way", action="append", help="only ways of training with this in their name; default: all")
    options = parser.parse_args()
    alone(show_environment)
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, options.moe_layers)
        vocabulary = Architecture.from_checkpoint(folder).vocab_size
        samples = Load(options.tokens, options.sequences, 1, vocabulary).pack(0)
        for way, config in ways(folder, options.tokens).items():
            if options.way and not any(asked in way for asked in options.way):
                continue
            print(way, flush=True)
            for row in alone(measure, config, samples):
                figures = f"measured {row.measured / GIB:6.2f} GiB, planned {row.planned / GIB:6.2f} ({row.error:+.1%})"
                print(f"   {row.moment:22} {figures}", flush=True)
                worst = max(worst, abs(row.error))
    print(f"the plan is at most {worst:.1%} off; allowed: {TOLERANCE:.0%}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
