"""What this node reaches, the recipe's engine included, and the cheapest settings by it: `make tune MEASURE=1`.

    python -m recipe.smoke.measure --recipe R [--output runs/measured/rates.json] [flags of recipe.plan.tune]

It measures host memory, matrix products, GPU memory, bus and NVLink; training steps of a few layers; how fast the
recipe's engine generates, with random weights of the full size where it has no others, and takes new weights. It writes
that down for the --rates of later plans, and tunes by it. 3 to 4 minutes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from recipe.config import Resolved
from recipe.config.error_text import listed
from recipe.config.flags import parse_command_line
from recipe.container.provenance import inside_image
from recipe.plan.hardware import GIB, GPUS, Machine
from recipe.plan.lengths import Lengths
from recipe.plan.machine import FoundMachine, read_machine
from recipe.plan.measured_work import MeasuredWork
from recipe.plan.node import Rates, machine_as_measured, read_rates
from recipe.plan.options import add_options, lengths_of, machine_of, read_without_weights
from recipe.plan.plan import Plan, make_plan
from recipe.plan.preflight import BUSY
from recipe.plan.ranges import range_text
from recipe.plan.tune.recipe_file import check_target
from recipe.smoke.decode import measure_decoding, running_engine
from recipe.smoke.training import ComputesWrongly, measure_training
from recipe.smoke.weight_update import measure_update
from recipe.system.errors import UserError, run_main
from recipe.system.files import atomic_write_text

KEPT = ("runs", "build")
"""Folders that outlive the image's container."""
CONTEXTS = (1024, 4096, 8192)
"""Tokens before those that are generated."""
ACCEPT_LENGTH = 2.35
"""Tokens that a verification of drafts is made to bring."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.smoke.measure",
        description="Measures this node, and tunes a recipe by it. All other flags are the run's.",
        allow_abbrev=False,
    )
    add_options(parser)
    parser.set_defaults(gpu=None, host_memory=None)
    parser.add_argument("--best", type=int, default=3, help="how many to show (default: 3)")
    parser.add_argument("--write", type=Path, metavar="FILE.toml", help="a recipe with the cheapest, which is new")
    parser.add_argument("--output", type=Path, default=Path("runs/measured/rates.json"), help="file to write")
    return parser


def check(options: argparse.Namespace, flags: Sequence[str], found: FoundMachine) -> None:
    """Raises UserError for what would fail, or mislead, when all is measured."""
    if not found.gpus:
        raise UserError("there is no GPU to measure here: without MEASURE=1, make tune takes what data sheets say")
    others = ("gpu", "host_memory", "disk", "rates")
    if told := [f"--{name.replace('_', '-')}" for name in others if getattr(options, name) is not None]:
        raise UserError(f"{listed(told)}: this machine is measured, and nothing else is asked about; drop it")
    if busy := [str(number) for number, gpu in enumerate(found.gpus) if gpu.used > BUSY]:
        raise UserError(f"GPU {', '.join(busy)} is in use, and would seem too slow: end what uses it first")
    if options.write is None:
        return
    if parse_command_line(flags).recipe is None:
        raise UserError("--write makes a recipe that extends the given one: name it with --recipe")
    if inside_image() and options.write.parts[0] not in KEPT:
        raise UserError(
            f"--write {options.write}: the image keeps runs/ and build/ only: try runs/{options.write.name}"
        )
    check_target(options.write)


def describe(options: argparse.Namespace, found: FoundMachine) -> None:
    """Makes this machine the one that is asked about."""
    smallest = min(found.gpus, key=lambda gpu: gpu.memory)
    word = next((name for name in GPUS if name.partition("-")[0] in smallest.name), None)
    if word is None:
        raise UserError(f"{smallest.name} is no GPU that the plan knows ({', '.join(GPUS)})")
    options.gpu = f"{word.partition('-')[0]}={smallest.memory / GIB:.1f}"
    options.host_memory, options.disk = f"{found.host_memory}B", f"{found.disk}B"


def measure(resolved: Resolved, sheet: Machine, lengths: Lengths, output: Path) -> Rates:
    """All of this node, which is `sheet` by data sheets; each part's processes have ended before the next one begins.
    A trainer that cannot be measured is told and left out. Raises UserError for an engine that the node has too few
    GPUs for, for GPUs that compute wrongly, and if another part fails: `output` then has those before it."""
    needed = resolved.config.sglang.rollout_num_gpus_per_engine
    if needed > sheet.gpus:
        raise UserError(
            f"an engine of this recipe has {needed} GPUs, and this machine {sheet.gpus}: give "
            "--rollout-num-gpus-per-engine, and the --sglang-* sizes, for so many"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "recipe.smoke.rates", "--num-gpus", str(sheet.gpus), "--output", str(output)]
    if status := subprocess.run(command, check=False).returncode:
        raise UserError(f"measuring rates ended with status {status}: what it printed stands above")
    rates = read_rates(output)
    here = machine_as_measured(sheet, rates)
    try:
        rates = with_work(rates, measure_training(resolved, here, lengths), output)
    except ComputesWrongly:
        raise
    except UserError as error:
        print(f"training stays as planned: {error}", file=sys.stderr, flush=True)
    with running_engine(resolved, max(CONTEXTS), ACCEPT_LENGTH, output.with_name("engine.log")) as engine:
        decoding = measure_decoding(engine, resolved, CONTEXTS, ACCEPT_LENGTH)
        rates = with_work(replace(rates, decoding=(decoding,)), (), output)
        return with_work(rates, measure_update(resolved, here, lengths, engine.url), output)


def with_work(rates: Rates, work: Sequence[MeasuredWork], output: Path) -> Rates:
    """The rates with further work, which is told; they are kept in `output`."""
    for part in work:
        print(part, flush=True)
    rates = replace(rates, work=(*rates.work, *work))
    atomic_write_text(output, json.dumps(asdict(rates), indent=1) + "\n")
    return rates


def dollars(plan: Plan) -> str:
    assert plan.time is not None
    return f"${range_text(plan.time.dollars)}"


def main() -> int:
    options, flags = _parser().parse_known_args()
    found = read_machine(options.output)
    check(options, flags, found)
    describe(options, found)
    resolved = read_without_weights(flags)[1]
    sheet, lengths = machine_of(options, resolved.config), lengths_of(options, resolved.config)
    rates = measure(resolved, replace(sheet, gpus=len(found.gpus)), lengths, options.output)
    here = machine_as_measured(sheet, rates)
    before, after = (make_plan(resolved, one, on_gpu=True, lengths=lengths) for one in (sheet, here))
    print(f"wrote {options.output}: the given recipe costs {dollars(after)} by it, {dollars(before)} by data sheets\n")
    words = ["--gpu", options.gpu, "--host-memory", options.host_memory, "--disk", options.disk]
    words += ["--price", str(options.price), "--rates", str(options.output), "--best", str(options.best)]
    words += ["--response-len", str(options.response_len)] if options.response_len is not None else []
    words += ["--response-spread", str(options.response_spread)]
    words += ["--lengths-of", str(options.lengths_of)] if options.lengths_of is not None else []
    words += ["--write", str(options.write)] if options.write is not None else []
    return subprocess.run([sys.executable, "-m", "recipe.plan.tune", *words, *flags], check=False).returncode


if __name__ == "__main__":
    run_main(main)
