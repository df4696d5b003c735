#!/usr/bin/env python3
"""A training checkpoint of the 8-GPU recipe's ranks: seconds to put it together, to write it and to read it again,
beside the same bytes written plainly by the same processes in the same run.

With random weights, 1 dense and so many MoE layers at the true widths, the experts spread over all ranks, CPU Adam.

    scripts/bench_save.py DIR [--gpus 2] [--moe-layers 5]
    scripts/bench_save.py DIR --device cpu          two processes with a small model, or with --tiny a tiny one
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from glm_flash import TINY, environment, write_config
from trainer_ranks import Ranks, build_rank, recipe_config, step_optimizer

from recipe.messages import Progress
from recipe.smoke.random_model import fill_randomly
from recipe.system.errors import run_main
from recipe.weights.checkpoints import name_of

if TYPE_CHECKING:
    from recipe.config import Config
    from recipe.megatron.layout import Rendezvous

SMALL = {"vocab_size": 16384, "n_routed_experts": 8, "num_experts_per_tok": 2, "eos_token_id": [1], "pad_token_id": 0}
"""For a CPU: 0.3 billion parameters."""
PIECE = 64 << 20
"""Bytes of a plain write."""
MEMORY = 1 << 30
"""Bytes that plain writes are from: too many for the processor's caches."""


@dataclass(frozen=True)
class Save:
    """Seconds on the slowest rank, and bytes of this one."""

    put_together: float
    written: float
    read: float
    plain: float
    size: int


def measure(rendezvous: "Rendezvous", config: "Config", folder: Path) -> Save:
    """A rank's part."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from recipe.megatron import checkpoint

    rank = build_rank(config, rendezvous)
    fill_randomly(rank)
    step_optimizer(rank)

    def seconds(work: Callable[[], object]) -> float:
        dist.barrier()
        began = time.perf_counter()
        work()
        dist.barrier()
        return time.perf_counter() - began

    shards: checkpoint.Shards = {}
    put_together = seconds(lambda: shards.update(checkpoint.own_shards(rank.chunks, rank.optimization)))
    size = sum(shard.data.nbytes for shard in nested_values(shards))
    progress = Progress(rollouts=1, optimizer_steps=1)
    written = seconds(lambda: checkpoint.save(folder, shards, progress, None))
    shards.clear()
    read = seconds(lambda: checkpoint.load(folder / name_of(1), rank.chunks, rank.optimization))
    if rendezvous.rank == 0:
        shutil.rmtree(folder / name_of(1))
    plain = seconds(lambda: write_plainly(folder / f"plain-{rendezvous.rank}", size))
    return Save(put_together, written, read, plain, size)


def write_plainly(path: Path, size: int) -> None:
    """As many bytes, from memory that is at hand, to the disk."""
    memory = torch.ones(min(size, MEMORY), dtype=torch.uint8).numpy().data
    with path.open("wb", buffering=0) as file:
        for begin in range(0, size, PIECE):
            place = begin % len(memory)
            file.write(memory[place : place + min(PIECE, size - begin)])
        os.fsync(file.fileno())
    path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where checkpoints would go")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--moe-layers", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model that only shows that it works")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory) as name, Ranks(options.gpus, options.device) as ranks:
        folder = Path(name)
        changes = TINY if options.tiny else SMALL if on_cpu else {}
        write_config(folder / "hf", 1 if on_cpu else options.moe_layers, **changes)
        flags = "--device cpu --no-bf16 --attention-backend auto" if on_cpu else ""
        found = ranks.together(measure, recipe_config(folder / "hf", options.gpus, flags), folder)
    one, size = found[0], sum(rank.size for rank in found) / 1e9
    largest = max(rank.size for rank in found) / 1e9
    print(f"{'two processes' if on_cpu else environment()}, {options.gpus} ranks: {size:.3g} GB, {largest:.3g} of one")
    for what, spent in (("put together", one.put_together), ("written", one.written), ("read", one.read)):
        print(f"{what:13} {spent:6.2f} s  {size / spent:6.2f} GB/s")
    print(f"{'plain writes':13} {one.plain:6.2f} s  {size / one.plain:6.2f} GB/s: the limit")


if __name__ == "__main__":
    run_main(main)
