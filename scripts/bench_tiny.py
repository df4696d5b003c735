"""The tiny recipe beside TRL's GRPOTrainer: samples per second, and time to a held-out reward, on this machine.

    python scripts/bench_tiny.py [--seeds 3] [--target 0.9] [--max-steps 1000] [--eval-interval 10]

Both start from the same warmed-up checkpoint and take checkpoint, prompts, batch, lengths and held-out questions from
the recipe `tiny`. They run in turns, seed by seed. Each stops at the first evaluation of the whole held-out set
(temperature 1) that reaches the target. Times are of training steps: start-up, evaluation and checkpoints are left out
on both sides. `make bench-tiny` runs this; TRL gets an environment of its own, .venv-trl.
"""

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from recipe.config import Config, resolve
from recipe.system.errors import UserError, run_main
from recipe.system.files import atomic_write_text

RECIPE = "tiny"
OUTPUT = Path("build/bench-tiny")
TRL_PYTHON = Path(".venv-trl/bin/python")
OURS, TRL = "ours", "TRL"
UNTIMED_STEPS = 5
"""First steps of a run, left out of the samples per second: caches are cold."""
NOT_TRAINING = ("eval", "save")
POLL_S = 0.2
STOP_TIMEOUT_S = 120.0

TRL_SETTINGS = {"lr": "1e-4", "loss-type": "grpo", "experts": "eager"}
"""The best of a sweep over learning rate, warm-up, loss type, Adam's beta2, experts implementation and threads."""


@dataclass(frozen=True)
class Run:
    """One training run. Times in seconds."""

    side: str
    seed: int
    steps: Sequence[Mapping[str, float]]
    """A step's phases; `other` is what none of them measured."""
    evals: Sequence[tuple[int, float]]
    """(steps done, held-out reward)."""

    @property
    def seconds_per_step(self) -> float:
        """Median."""
        return statistics.median(sum(step.values()) for step in self.steps[UNTIMED_STEPS:])

    def steps_to(self, target: float) -> int | None:
        """Steps before the first evaluation that reached `target`; None: none did."""
        return next((step for step, reward in self.evals if reward >= target), None)

    def seconds_to(self, target: float) -> float | None:
        """Time of those steps."""
        steps = self.steps_to(target)
        return None if steps is None else sum(sum(step.values()) for step in self.steps[:steps])

    def phase_means(self) -> dict[str, float]:
        """Mean seconds a step of every phase."""
        timed = self.steps[UNTIMED_STEPS:]
        return {phase: statistics.fmean(step.get(phase, 0.0) for step in timed) for phase in timed[-1]}


def run_ours(seed: int, arguments: argparse.Namespace, held_out: str) -> Run:
    """`python -m recipe.train --recipe tiny`, interrupted (as by Ctrl-C) once the target is reached."""
    directory = OUTPUT / f"seed-{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    flags = {"seed": seed, "num-rollout": arguments.max_steps, "eval-interval": arguments.eval_interval}
    flags |= {"runs-dir": OUTPUT, "name": directory.name}
    command = [sys.executable, "-m", "recipe.train", "--recipe", RECIPE]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    metrics, key = directory / "metrics.jsonl", f"eval/{held_out}"
    log_path = OUTPUT / f"ours-{seed}.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and not any(
            line.get(key, 0.0) >= arguments.target for line in read_whole_lines(metrics)
        ):
            time.sleep(POLL_S)
        process.send_signal(signal.SIGINT)
        process.wait(STOP_TIMEOUT_S)
    lines = read_whole_lines(metrics)
    if len(lines) <= UNTIMED_STEPS:
        raise UserError(f"our run with seed {seed} stopped after {len(lines)} steps; see {log_path}")
    evals = [(int(line["step"]), line[key]) for line in lines if key in line]
    return Run(OURS, seed, [our_phases(line) for line in lines if line["step"] > 0], evals)


def our_phases(line: Mapping[str, float]) -> dict[str, float]:
    """The phases of a line of metrics.jsonl that are training."""
    phases = {name.removeprefix("seconds_"): value for name, value in line.items() if name.startswith("seconds_")}
    total = phases.pop("step")
    other = total - sum(phases.values())
    return {name: value for name, value in phases.items() if name not in NOT_TRAINING} | {"other": other}


def run_trl(seed: int, arguments: argparse.Namespace, config: Config) -> Run:
    """bench_tiny_trl.py in TRL's environment, on the same checkpoint, data, batch and lengths."""
    path = OUTPUT / f"trl-{seed}.json"
    path.unlink(missing_ok=True)
    flags = {
        "model": config.model.hf_checkpoint,
        "train": config.data.prompt_data[0].path,
        "heldout": config.eval.eval_prompt_data[0].path,
        "rm-type": config.rollout.rm_type,
        "prompts": config.rollout.rollout_batch_size,
        "generations": config.rollout.n_samples_per_prompt,
        "max-completion-length": config.rollout.rollout_max_response_len,
        "steps": arguments.max_steps,
        "eval-interval": arguments.eval_interval,
        "eval-samples": config.eval.n_samples_per_eval_prompt,
        "target": arguments.target,
        "seed": seed,
        "output": path,
        **TRL_SETTINGS,
    }
    command = [str(TRL_PYTHON), str(Path(__file__).with_name("bench_tiny_trl.py"))]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    log_path = OUTPUT / f"trl-{seed}.log"
    with log_path.open("w") as log:
        environment = os.environ | {"PYTHONPATH": "."}
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
    if not path.exists():
        raise UserError(f"TRL's run with seed {seed} failed; see {log_path}")
    result = json.loads(path.read_text())
    return Run(TRL, seed, result["steps"], [(entry["step"], entry["reward"]) for entry in result["evals"]])


def read_whole_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a JSON lines file that may be growing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    models = {
        line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    }
    packages = {name: version(name) for name in ("torch", "transformers", "megatron-core", "ray")}
    load = os.getloadavg()[0]
    return {"cpu": ", ".join(sorted(models)), "cores": os.cpu_count(), "load_average": load, "packages": packages}


def report(runs: Sequence[Run], target: float, samples_per_step: int) -> str:
    """The table: a line a run, then a side's medians over the seeds and where its steps' time goes."""
    lines = [f"{'':6}{'seed':>5}{'samples/s':>11}{'ms/step':>9}{f'steps to {target}':>14}{f'time to {target}':>16}"]
    for run in sorted(runs, key=lambda run: (run.side != OURS, run.seed)):
        rate, step = samples_per_step / run.seconds_per_step, 1000 * run.seconds_per_step
        reached, seconds = run.steps_to(target), reach(run.seconds_to(target))
        lines.append(
            f"{run.side:6}{run.seed:5}{rate:11.0f}{step:9.0f}{'never' if reached is None else reached:>14}{seconds:>16}"
        )
    for side in (OURS, TRL):
        mine = [run for run in runs if run.side == side]
        rate = statistics.median(samples_per_step / run.seconds_per_step for run in mine)
        ascending = sorted((run.seconds_to(target) for run in mine), key=lambda seconds: seconds or math.inf)
        means = [run.phase_means() for run in mine]
        parts = ", ".join(f"{name} {1000 * statistics.fmean(mean[name] for mean in means):.0f}" for name in means[0])
        lines.append(
            f"{side}: median {rate:.0f} samples/s, {reach(ascending[len(mine) // 2])} to {target}; ms a step: {parts}"
        )
    return "\n".join(lines)


def reach(seconds: float | None) -> str:
    """A time to the target as text."""
    return "never" if seconds is None else f"{seconds:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each side")
    parser.add_argument("--target", type=float, default=0.9, help="held-out reward to reach")
    parser.add_argument("--max-steps", type=int, default=1000, help="steps after which a run gives up")
    parser.add_argument("--eval-interval", type=int, default=10, help="steps between evaluations")
    arguments = parser.parse_args()
    config = resolve(["--recipe", RECIPE]).config
    subprocess.run(["scripts/install.sh", ".venv-trl", "bench-trl"], check=True)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    before, runs = machine(), list[Run]()
    for seed in range(1, arguments.seeds + 1):
        runs.append(run_ours(seed, arguments, config.eval.eval_prompt_data[0].name))
        runs.append(run_trl(seed, arguments, config))
        print(report(runs, arguments.target, config.samples_per_rollout), flush=True)
    result = {"machine": before, "target": arguments.target, "runs": [asdict(run) for run in runs]}
    atomic_write_text(OUTPUT / "report.json", json.dumps(result, indent=1) + "\n")
    print(f"every step and evaluation: {OUTPUT / 'report.json'}")


if __name__ == "__main__":
    run_main(main)
