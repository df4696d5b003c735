#!/usr/bin/env python3
"""How evenly the packing spreads a batch over data-parallel ranks, from 8 to 1,024 of them, with and without
--balance-data. No GPU: it runs the trainer's own scheduling on lengths drawn as long-tailed as those of reasoning RL
(log-normal responses cut off at the longest allowed).

- room: share of the packs' tokens that stay empty;
- ranks: cost of the costliest rank above the mean rank's;
- in step: the same where ranks wait for each other at every pack, as expert parallelism makes them;
- cost is that of GLM-4.7-Flash: linear and quadratic FLOPs of each sequence.

    scripts/simulate_packing.py [--samples-per-rank 32] [--max-tokens 8192] [--median 2500] [--longest 8192]
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from glm_flash import write_config

from recipe.batching.schedule import schedule
from recipe.config import Architecture
from recipe.plan.flops import SequenceCost, sequence_cost

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
PROMPT_TOKENS, SPREAD = 150, 0.9


def draw_lengths(count: int, median: int, longest: int, seed: int) -> list[int]:
    """Prompt and response together, in tokens."""
    draw = np.random.default_rng(seed)
    responses = np.minimum(draw.lognormal(np.log(median), SPREAD, count), longest - PROMPT_TOKENS)
    return (PROMPT_TOKENS + responses).astype(int).tolist()


def model_cost() -> SequenceCost:
    """Of the whole model."""
    with tempfile.TemporaryDirectory() as name:
        write_config(Path(name), 46)
        return sequence_cost(Architecture.from_checkpoint(Path(name)))


def simulate(lengths: list[int], ranks: int, max_tokens: int, cost: SequenceCost, balanced: bool) -> str:
    """One line of the table."""
    began = time.perf_counter()
    plan = schedule(lengths, data_parallel_size=ranks, max_tokens=max_tokens, cost=cost if balanced else None)
    seconds = time.perf_counter() - began
    packs = [[sum(cost(lengths[i]) for i in pack) for pack in rank] for rank in plan]
    costs = np.array(packs)
    room = 1 - sum(lengths) / (costs.size * max_tokens)
    of_ranks = costs.sum(1).max() / costs.sum(1).mean() - 1
    in_step = costs.max(0).sum() / costs.sum(1).mean() - 1
    how = "balanced" if balanced else "in turn"
    return f"{ranks:6} {how:10}{costs.shape[1]:8}{room:9.1%}{of_ranks:9.1%}{in_step:10.1%}{seconds:10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples-per-rank", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--median", type=int, default=2500)
    parser.add_argument("--longest", type=int, default=8192)
    options = parser.parse_args()
    cost = model_cost()
    print(f"{'ranks':>6} {'dealt':10}{'packs':>8}{'room':>9}{'ranks':>9}{'in step':>10}{'seconds':>10}")
    for ranks in RANKS:
        lengths = draw_lengths(ranks * options.samples_per_rank, options.median, options.longest, seed=ranks)
        for balanced in (False, True):
            print(simulate(lengths, ranks, options.max_tokens, cost, balanced), flush=True)


if __name__ == "__main__":
    main()
