#!/usr/bin/env python3
"""How fast a recipe's engine reads, generates and takes new weights on this machine's GPUs, layout by layout, beside
what the plan says: measured by the code of `make tune MEASURE=1`, a slice of the model or all of it, with random
weights.

    scripts/check_decode.py RECIPE [--layouts dp,tp,single] [--moe-layers 5] [--sequences 16,64,256]
                                   [--contexts 1024,4096] [--rates rates.json] [flags of the run]

dp      an engine over all GPUs, whose groups hold different sequences (DP attention)
tp      an engine over all GPUs, which share every sequence
single  an engine of one GPU, with a GPU's share of the sequences; it stands for one on each

A layout that the recipe cannot have on this machine is left out, which is told. Ends with 1 if the plan is more than
15% off, or nothing was measured.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from check_loop import Row
from glm_flash import write_config

from recipe.config import Resolved, resolve
from recipe.plan.generation import Generation
from recipe.plan.hardware import Machine
from recipe.plan.lengths import Lengths
from recipe.plan.machine import read_machine
from recipe.plan.memory import GpuModel
from recipe.plan.node import machine_as_measured, read_rates
from recipe.plan.preflight import machine_like
from recipe.plan.ranges import Between, Pace
from recipe.smoke.decode import Engine, running_engine
from recipe.smoke.weight_update import measure_update
from recipe.system.errors import UserError, run_main

TOLERANCE = 0.15
LAYOUTS = ("dp", "tp", "single")
NO_GROUPS = ("enable-dp-attention", "enable-dp-lm-head", "moe-dense-tp-size")
"""Flags of recipes that only DP attention has."""
ACCEPT_LENGTH = 2.35
READ_AT_ONCE = 4
"""Prompts of each group."""
TRIES = 3


def layout_flags(layout: str, gpus: int) -> list[str]:
    """The run on one machine of so many GPUs, with its engines in this layout."""
    each = 1 if layout == "single" else gpus
    groups = gpus if layout == "dp" else 1
    numbers = {
        "actor-num-nodes": 1,
        "actor-num-gpus-per-node": gpus,
        "tensor-model-parallel-size": 1,
        "pipeline-model-parallel-size": 1,
        "context-parallel-size": 1,
        "expert-model-parallel-size": gpus,
        "rollout-num-gpus-per-engine": each,
        "sglang-dp-size": groups,
        "sglang-ep-size": each,
    }
    words = [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
    if groups == 1:
        words += [word for name in NO_GROUPS for word in (f"--sglang-{name}", "false")]
    return words


@dataclass(frozen=True)
class Layout:
    """An engine of a run on this machine, and the plan of it."""

    name: str
    resolved: Resolved
    machine: Machine
    lengths: Lengths

    @property
    def engines(self) -> int:
        """On this machine, of which one is measured."""
        return self.resolved.config.num_engines

    def planned(self, pace: Pace) -> Generation:
        memory = GpuModel.of(self.resolved, self.machine, on_gpu=True)
        return Generation(self.resolved, memory, self.lengths, self.lengths, pace)

    def token_s(self, sequences: int, context: int) -> Between:
        """Planned seconds by which each of so many sequences of an engine gets a token more."""
        best, worst = map(self.planned, Pace)
        groups = best.engine.attention_groups
        load = np.array([sequences / groups]), np.array([sequences]), np.array([float(context)])
        return Between(float(best.decoding.token(*load)[0]), float(worst.decoding.token(*load)[0]))

    def rows(self, engine: Engine, sequences: Sequence[int], contexts: Sequence[int]) -> Iterator[Row]:
        """What is measured of a running engine, beside the plan; `sequences` are those of the machine."""
        groups = engine.groups * self.engines
        if uneven := [count for count in sequences if count % groups]:
            raise UserError(f"--sequences {uneven[0]} cannot be dealt to {groups} groups of GPUs alike")
        yield self.reading(engine, max(contexts))
        for point in engine.points([count // groups for count in sequences], contexts):
            rate = self.engines * point.sequences / point.seconds
            name = f"{self.engines * point.sequences} x {point.context}, {rate:,.0f}/s"
            planned = self.token_s(point.sequences, point.context)
            yield Row(name, 1e3 * point.seconds, Between(1e3 * planned.best, 1e3 * planned.worst), "ms", TOLERANCE)
        for work in measure_update(self.resolved, self.machine, self.lengths, engine.url):
            yield Row(str(work.kind.work), work.seconds, work.planned, "s", TOLERANCE)

    def reading(self, engine: Engine, length: int) -> Row:
        """Seconds to read prompts of so many tokens which the engine has not seen."""
        count = engine.groups * READ_AT_ONCE
        prompts = engine.prompts(count * (TRIES + 1), length)
        engine.seconds(prompts[-count:], 1)  # what is compiled at its first use
        took = statistics.median(engine.seconds(prompts[part * count :][:count], 1) for part in range(TRIES))
        tokens = self.engines * count * length
        best, worst = (self.planned(pace).reading_s(tokens) for pace in Pace)
        return Row(f"reading, {tokens / took:,.0f}/s", took, Between(best, worst), "s", TOLERANCE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="which, with commas")
    parser.add_argument("--moe-layers", type=int, default=5, help="beside a dense one; 46: the whole model")
    parser.add_argument("--sequences", default="16,64,256", help="at once, of the machine")
    parser.add_argument("--contexts", default="1024,4096", help="tokens before those that are generated")
    parser.add_argument("--rates", type=Path, help="rates.json of this machine (default: data sheets)")
    parser.add_argument("--directory", type=Path, default=Path("build/check-decode"), help="where everything goes")
    options, further = parser.parse_known_args()
    sequences, contexts = ([*map(int, words.split(","))] for words in (options.sequences, options.contexts))
    found = read_machine(options.directory)
    if not found.gpus:
        raise UserError("there is no GPU here")
    write_config(options.directory / "model", options.moe_layers)
    common = ["--recipe", options.recipe, "--hf-checkpoint", str(options.directory / "model"), "--prompt-data", "none"]
    if unknown := [name for name in options.layouts.split(",") if name not in LAYOUTS]:
        raise UserError(f"--layouts {unknown[0]}: there are {', '.join(LAYOUTS)}")
    resolved_of: dict[str, Resolved] = {}
    for name in options.layouts.split(","):
        try:
            resolved_of[name] = resolve([*common, *layout_flags(name, len(found.gpus)), *further])
        except UserError as error:
            print(f"{name} is left out: {error}", flush=True)
    rows: list[Row] = []
    for name, resolved in resolved_of.items():
        machine = machine_like(resolved, found)
        if options.rates is not None:
            machine = machine_as_measured(machine, read_rates(options.rates))
        layout = Layout(name, resolved, machine, Lengths(np.array([float(max(contexts))])))
        log, most = options.directory / f"{name}.log", max(sequences) // (1 if name == "tp" else len(found.gpus))
        with running_engine(resolved, max(contexts), ACCEPT_LENGTH, log, most) as engine:
            print(f"{name}: {layout.engines} engines, {engine.groups} groups of GPUs each", flush=True)
            for row in layout.rows(engine, sequences, contexts):
                print(row, flush=True)
                rows.append(row)
    return int(not rows or not all(row.holds for row in rows))


if __name__ == "__main__":
    run_main(main)
