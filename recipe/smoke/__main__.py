"""Whether this node is good for training, in a few minutes: a small model learns by the whole loop.

    python -m recipe.smoke [--num-gpus N] [--price 2.5] [--name smoke] [any flag of GRPO]

The model has the kernel sizes of GLM-4.7-Flash. It is warmed up supervised, and trained by GRPO as the 8-GPU MTP recipe
does it, with an interruption and a resume. Without a GPU the tiny model does what a CPU can. Ends with a table and a
verdict, also in runs/NAME/smoke.txt and smoke.json; status 0 if the node is good, 1 if it is not.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from recipe.plan.machine import read_machine
from recipe.smoke.measured import Measured
from recipe.smoke.settings import Settings, gpus_to_use
from recipe.smoke.steps import SmokeRun
from recipe.smoke.table import Row, render, rows, verdict
from recipe.smoke.verdict import reasons
from recipe.system.errors import UserError, run_main
from recipe.system.files import atomic_write_text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.smoke",
        description="Whether this node is good for training. All other flags are GRPO's.",
        allow_abbrev=False,
    )
    parser.add_argument("--num-gpus", type=int, help="1, 2, 4 or 8 (default: all, as far as that suits)")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu: leave GPUs alone")
    parser.add_argument(
        "--engine", choices=("embedded", "sglang"), default="embedded", help="without a GPU (default: embedded)"
    )
    parser.add_argument("--price", type=float, default=2.5, help="dollars a GPU and hour (default: 2.5)")
    parser.add_argument("--name", default="smoke", help="of the directory in --runs-dir")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--warm-up-steps", type=int, help="supervised steps (default: the recipe's)")
    parser.add_argument("--interrupt-after", type=int, default=12, help="GRPO step that gets a SIGTERM (default: 12)")
    return parser


def fresh_directory(path: Path) -> Path:
    """`path`, empty; an earlier smoke run there gets the time of its last change as a suffix."""
    if path.exists():
        kept = path.with_name(f"{path.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(path.stat().st_mtime))}")
        path.rename(kept)
        print(f"the earlier {path} is now {kept}")
    path.mkdir(parents=True)
    return path


def record(directory: Path, measured: Measured, table: Sequence[Row], why: Sequence[str]) -> str:
    """Writes smoke.txt and smoke.json. Returns the text."""
    text = render(table, why)
    document = {"good": not why, "verdict": verdict(why), "table": dict(table), "measured": asdict(measured)}
    atomic_write_text(directory / "smoke.txt", text + "\n")
    atomic_write_text(directory / "smoke.json", json.dumps(document, indent=1) + "\n")
    return text


def main() -> int:
    options, flags = _parser().parse_known_args()
    machine = read_machine(options.runs_dir)
    if options.device == "cpu" and options.num_gpus:
        raise UserError(f"--num-gpus {options.num_gpus} and --device cpu contradict one another: drop one")
    gpus = 0 if options.device == "cpu" else gpus_to_use(options.num_gpus, len(machine.gpus))
    settings = Settings(
        directory=fresh_directory(options.runs_dir / options.name),
        gpus=gpus,
        seed=options.seed,
        warm_up_steps=options.warm_up_steps,
        interrupt_after=options.interrupt_after,
        engine=options.engine,
        flags=tuple(flags),
    )
    measured = SmokeRun(settings, machine, options.price).carry_out()
    why = reasons(measured)
    print("\n" + record(settings.directory, measured, rows(measured), why))
    return 1 if why else 0


if __name__ == "__main__":
    run_main(main)
