#!/usr/bin/env python3
"""Replay of the engine's routing beside none: the smoke run's model learns by GRPO with several seeds, each twice.

One warm-up serves all runs. Every run has a GPU of its own; with several GPUs they go on beside one another. Shows for
each run the held-out score before and after, the reward of its last steps, what trainer and engine differ by, and
tokens a second on both sides. Without a GPU the tiny model does it on two ranks.

    scripts/check_replay.py DIR [--seeds 1 2 3] [--gpus 2] [--device cpu] [--warm-up-steps N] [any flag of GRPO]
"""

import argparse
import os
import queue
import statistics
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recipe.data.arithmetic_task import write_task
from recipe.smoke.measured import HELD_OUT, SETTLED, read_lines
from recipe.smoke.settings import Settings, train_command
from recipe.smoke.steps import HELD_OUT_SUMS, MAX_OPERAND
from recipe.system.errors import UserError, run_main
from recipe.weights.tiny import KERNEL_SIZES, write_tiny_checkpoint

REPLAYS = {True: "--use-rollout-routing-replay", False: "--no-use-rollout-routing-replay"}
LAST_STEPS = 10
COLUMNS = ("held-out", "reward", "nats a token", "k3 KL", "elsewhere", "rollout tok/s", "train tok/s")


@dataclass(frozen=True)
class Case:
    """A run."""

    seed: int
    replays: bool

    @property
    def name(self) -> str:
        return f"seed-{self.seed}-{'replay' if self.replays else 'plain'}"


def run(command: Sequence[str], log: Path, gpu: str | None) -> None:
    """Carries it out on that GPU. Raises UserError if it fails."""
    environment = os.environ if gpu is None else os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
    with log.open("w") as output:
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if status:
        raise UserError(f"a run ended with status {status}: see {log}")


def warm_up(settings: Settings, gpu: str | None) -> None:
    """Makes the task and the model that all runs begin with."""
    write_task(settings.task, settings.seed, MAX_OPERAND, HELD_OUT_SUMS, keep_orders_together=not settings.gpus)
    write_tiny_checkpoint(settings.untrained, settings.seed, KERNEL_SIZES if settings.gpus else None)
    run(train_command(settings.warm_up_flags()), settings.directory / "sft.log", gpu)


def flags_of(case: Case, settings: Settings) -> list[str]:
    """Those of a run, from its beginning to its end."""
    words = [*replace(settings, seed=case.seed).grpo_flags(), "--name", case.name]
    return [*words, REPLAYS[case.replays]]


def figures(lines: Sequence[dict[str, Any]]) -> list[str]:
    """COLUMNS of the lines of a run's metrics."""
    steps = [line for line in lines if line["step"] > 0]
    scores = [line[HELD_OUT] for line in lines if HELD_OUT in line]

    def mean(name: str, chosen: Sequence[dict[str, Any]]) -> float | None:
        found = [line[name] for line in chosen if name in line]
        return statistics.fmean(found) if found else None

    values = [
        (mean("reward", steps[-LAST_STEPS:]), ".3f"),
        (mean("logprob_diff_mean", steps), ".5f"),
        (mean("logprob_kl", steps), ".1e"),
        (mean("routing_disagreement", steps), ".2%"),
        (mean("rollout_tokens_per_second", steps[SETTLED:]), ",.0f"),
        (mean("tokens_per_second", steps[SETTLED:]), ",.0f"),
    ]
    shown = [f"{scores[0]:.3f} to {scores[-1]:.3f}" if scores else "none"]
    return shown + ["-" if value is None else format(value, form) for value, form in values]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--gpus", type=int, default=1, help="runs at once, each on a GPU of its own")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--warm-up-steps", type=int, help="supervised steps (default: the recipe's)")
    options, flags = parser.parse_known_args()
    on_gpu = options.device != "cpu"
    settings = Settings(
        directory=options.directory.absolute(),
        gpus=int(on_gpu),
        seed=1234,
        warm_up_steps=options.warm_up_steps,
        interrupt_after=0,
        engine="embedded",
        flags=tuple(flags),
    )
    settings.directory.mkdir(parents=True)
    gpus = [str(number) for number in range(options.gpus)] if on_gpu else [None]
    warm_up(settings, gpus[0])
    cases = [Case(seed, replays) for seed in options.seeds for replays in (False, True)]
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for gpu in gpus:
        free.put(gpu)

    def carry_out(case: Case) -> list[str]:
        gpu = free.get()
        try:
            run(train_command(flags_of(case, settings)), settings.directory / f"{case.name}.log", gpu)
        finally:
            free.put(gpu)
        found = figures(read_lines(settings.directory / case.name))
        print(f"{case.name:16}" + "".join(f"{value:>17}" for value in found), flush=True)
        return found

    print(f"{'':16}" + "".join(f"{column:>17}" for column in COLUMNS), flush=True)
    with ThreadPoolExecutor(len(gpus)) as lanes:
        list(lanes.map(carry_out, cases))
    return 0


if __name__ == "__main__":
    run_main(main)
