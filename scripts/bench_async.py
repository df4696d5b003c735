"""Asynchronous training beside the synchronous loop, on the tiny model: what it gains, and how old the samples are.

    python scripts/bench_async.py [--staleness 1 2 4] [--orders fixed finished] [--rollouts 30] [--balance] [flags]

The runs are made one after the other, with one rank and one engine; further flags go to each of them. `make train-tiny`
must have made the checkpoint and the questions, or the flags name others. Steps are timed without evaluations and
checkpoints, the first ones left out, and the last ones, beside which no rollout is made any more.

The ideal step of a run that makes rollouts ahead is the synchronous one less the shorter of its two parts, training
and generating. On two cores the two take the cores from one another, and the ideal is out of reach. With `--balance`
rewards sleep, one after the other, so long that a rollout takes twice as long as training and the cores are idle
meanwhile: what is missing to the ideal is then the loop's own.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipe.system.errors import UserError, run_main
from recipe.system.files import atomic_write_text

OUTPUT = Path("build/bench-async")
UNTIMED_STEPS = 5
"""First steps of a run: caches are cold, and the first rollouts are made without any ahead of them."""
NOT_THE_STEP = ("seconds_eval", "seconds_save")
SLOW_REWARD = '''"""A reward that takes its time."""

import time


def reward(prompt: str, response: str, label: str) -> float:
    time.sleep({seconds})
    return float(label in response)
'''


@dataclass(frozen=True)
class Measured:
    """One run. Times in seconds."""

    name: str
    steps: Sequence[Mapping[str, float]]
    """Lines of metrics.jsonl without the evaluation before the first step."""
    most_ahead: int
    """Rollouts that the run furthest ahead has made before they are trained on."""

    def mean(self, metric: str) -> float:
        """Of a metric over the timed steps."""
        timed = self.steps[UNTIMED_STEPS : len(self.steps) - self.most_ahead]
        return statistics.fmean(step.get(metric) or 0.0 for step in timed)

    @property
    def step_s(self) -> float:
        """Mean time of a step."""
        return self.mean("seconds_step") - sum(map(self.mean, NOT_THE_STEP))

    @property
    def ideal_s(self) -> float:
        """The step's time if training and generating, one of which waits for the other here, went on at once."""
        learning = self.mean("seconds_train") + self.mean("seconds_log_probs")
        return self.step_s - min(learning, self.mean("seconds_rollout"))

    @property
    def held_out(self) -> float | None:
        """The last score of the first evaluation set."""
        scores = [step["eval/heldout"] for step in self.steps if "eval/heldout" in step]
        return scores[-1] if scores else None


def report(synchronous: Measured, others: Sequence[Measured]) -> str:
    """A line a run, the synchronous one first."""
    ideal = synchronous.step_s / synchronous.ideal_s
    lines = [
        f"ideal: {ideal:.2f} times as fast ({synchronous.ideal_s:.3f} s a step in place of {synchronous.step_s:.3f})",
        f"{'run':<14}{'s a step':>9}{'samples/s':>11}{'faster':>8}{'of ideal':>10}"
        f"{'staleness':>11}{'max':>5}{'trainer waits':>15}{'engines idle':>14}{'held-out':>10}",
    ]
    for run in (synchronous, *others):
        faster = synchronous.step_s / run.step_s
        held_out = "-" if run.held_out is None else f"{run.held_out:.3f}"
        idle = "-" if run is synchronous else f"{run.mean('seconds_engines_idle') / run.mean('seconds_step'):.0%}"
        oldest = max(step["staleness_max"] for step in run.steps)
        lines.append(
            f"{run.name:<14}{run.step_s:>9.3f}{run.mean('samples') / run.step_s:>11.1f}"
            f"{faster:>8.2f}{faster / ideal:>10.0%}"
            f"{run.mean('staleness_mean'):>11.2f}{oldest:>5.0f}{run.mean('seconds_rollout') / run.step_s:>15.0%}"
            f"{idle:>14}{held_out:>10}"
        )
    return "\n".join(lines)


def measure(name: str, flags: Sequence[str], most_ahead: int = 0) -> Measured:
    """Trains. Raises UserError if the run fails."""
    shutil.rmtree(OUTPUT / name, ignore_errors=True)
    one_of_each = ("--actor-num-gpus-per-node", "1", "--rollout-num-gpus", "1")
    where = ("--recipe", "tiny", "--runs-dir", str(OUTPUT), "--name", name)
    command = [sys.executable, "-m", "recipe.train", *where, *one_of_each, *flags]
    searched = os.pathsep.join(filter(None, (str(OUTPUT.resolve()), os.environ.get("PYTHONPATH"))))
    print(f"{name} ...", file=sys.stderr, flush=True)
    with (OUTPUT / f"{name}.log").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": searched}).returncode
    if status:
        raise UserError(f"the run {name} ended with status {status}: see {OUTPUT / name}.log")
    lines = [json.loads(line) for line in (OUTPUT / name / "metrics.jsonl").read_text().splitlines()]
    return Measured(name, [line for line in lines if line["step"]], most_ahead)


def balanced(flags: Sequence[str]) -> list[str]:
    """Flags with which a rollout takes twice as long as training does, as a short run measures it."""
    probe = measure("probe", [*flags, "--num-rollout", str(2 * UNTIMED_STEPS), "--eval-prompt-data", "none"])
    seconds = 2 * (probe.mean("seconds_train") + probe.mean("seconds_log_probs")) / probe.mean("samples")
    atomic_write_text(OUTPUT / "slow_reward.py", SLOW_REWARD.format(seconds=seconds))
    slow = "--eval-prompt-data none --custom-rm-path slow_reward:reward --rm-num-workers 1"
    return [*flags, *slow.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--staleness", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--orders", nargs="+", choices=("fixed", "finished"), default=["fixed", "finished"])
    parser.add_argument("--rollouts", type=int, default=30)
    parser.add_argument("--balance", action="store_true", help="rollouts take twice as long as training")
    arguments, flags = parser.parse_known_args()
    most_ahead = max(arguments.staleness)
    if arguments.rollouts <= UNTIMED_STEPS + most_ahead:
        untimed = f"the first {UNTIMED_STEPS} and the last {most_ahead} are not timed"
        raise UserError(f"--rollouts {arguments.rollouts}: {untimed}; give more")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    flags = balanced(flags) if arguments.balance else flags
    flags += ["--num-rollout", str(arguments.rollouts)]
    synchronous = measure("synchronous", flags, most_ahead)
    flags.append("--async-rollout")
    others = [
        measure(f"{order}-{bound}", [*flags, "--async-order", order, "--max-staleness", str(bound)], most_ahead)
        for order in arguments.orders
        for bound in arguments.staleness
    ]
    print(report(synchronous, others))


if __name__ == "__main__":
    run_main(main)
