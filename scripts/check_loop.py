#!/usr/bin/env python3
"""A recipe as a whole, on this machine's GPUs and a slice of the model: steps, an evaluation, a SIGTERM that saves, a
resume; and beside each phase's memory and seconds what the plan says of them, and the share of the time in which each
GPU had something to do.

The slice has one dense and so many MoE layers and the MTP layer at the true widths, with random weights; prompts are
random, and so are rewards. Experts and one engine are spread over all GPUs, unless flags say otherwise. After every
weight update every tensor of the engines is compared with the trainer's. Ends with 1 if the run does not go on as it
should, or the plan is more than 5% of the memory or 25% of the seconds off.

    scripts/check_loop.py RECIPE [--num-gpus 2] [--moe-layers 5] [--num-rollout 6] [--interrupt-after 5]
                                 [--rates runs/smoke/rates.json] [any flag of the run]
    scripts/check_loop.py tiny --device cpu      the same steps of the tiny model, without a plan beside them
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

import numpy as np
from glm_flash import write_slice
from trainer_ranks import alone

from recipe.config.sglang_rules import size_of
from recipe.config.speculation_rules import DEFAULT_DRAFT_STEPS
from recipe.plan.constants import DRAFT_ACCEPTANCE
from recipe.plan.hardware import GB, GIB, Machine
from recipe.plan.lengths import Lengths
from recipe.plan.machine import NVIDIA_SMI, read_machine
from recipe.plan.memory import Phase as PlannedPhase
from recipe.plan.node import machine_as_measured, read_rates
from recipe.plan.plan import Plan, make_plan
from recipe.plan.preflight import machine_like
from recipe.plan.ranges import Between
from recipe.plan.time_plan import Work
from recipe.run.phases import Phase
from recipe.smoke.measured import goes_on, read_lines
from recipe.smoke.process import carry_out
from recipe.smoke.projection import read_recipe
from recipe.smoke.settings import train_command
from recipe.system.errors import UserError, run_main
from recipe.system.files import atomic_write_text
from recipe.system.shutdown import SAVED_STATUS

MEMORY_TOLERANCE, SECONDS_TOLERANCE = 0.05, 0.25
SAMPLE_MS = 100
"""Between two looks at the GPUs' memory."""
EDGE_S = 0.15
"""Left out at both ends of a phase: when it began is known from the moment at which its step was written down."""
ORDER = (Phase.ROLLOUT, Phase.LOG_PROBS, Phase.TRAIN, Phase.UPDATE_WEIGHTS, Phase.EVAL)
"""In which a step goes through its phases."""
PLANNED = {
    Phase.ROLLOUT: PlannedPhase.ROLLOUT,
    Phase.TRAIN: PlannedPhase.TRAINING,
    Phase.UPDATE_WEIGHTS: PlannedPhase.UPDATE_WEIGHTS,
}
PARTS = {"forward and backward": "seconds_forward_backward", "Adam": "seconds_optimizer"}
"""Of training."""
PROMPTS, HELD_OUT_PROMPTS = 2000, 4


def settled(lines: Sequence[Mapping[str, float]], interrupt_after: int) -> list[Mapping[str, float]]:
    """The lines of steps that are not the first after a start: those load kernels, or compile them."""
    return [line for line in lines if line["step"] not in (0, 1, interrupt_after + 1)]


@dataclass
class Watch:
    """Looks at the run: when each step was written down, when to interrupt it, and the GPUs all the while."""

    directory: Path
    interrupt_after: int
    written: dict[int, float] = field(default_factory=dict)
    """Moment at which each step's line was there."""
    memory: list[tuple[float, list[int]]] = field(default_factory=list)
    """Bytes of every GPU at each moment."""
    busy: list[tuple[float, list[int]]] = field(default_factory=list)
    """Percent of the time just before each moment in which every GPU had something to do."""
    struck_at: float | None = None
    _size: int = 0

    def __call__(self, process: subprocess.Popen[str]) -> None:
        path = self.directory / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size == self._size:
            return
        self._size, now = size, time.monotonic()
        for line in read_lines(self.directory):
            self.written.setdefault(line["step"], now)
        if self.struck_at is None and 0 < self.interrupt_after <= max(self.written):
            self.struck_at = now
            process.terminate()

    @contextmanager
    def of_gpus(self, gpus: int) -> Iterator[None]:
        """Takes down what they hold and do while the block goes on; without GPUs nothing."""
        if not gpus:
            yield
            return
        command = [NVIDIA_SMI, "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
        command.append(f"-lms={SAMPLE_MS}")
        if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
            command.append(f"--id={visible}")
        sampler = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        reader = Thread(target=self._take_down, args=(sampler, gpus), daemon=True)
        reader.start()
        try:
            yield
        finally:
            sampler.terminate()
            sampler.wait()
            reader.join()

    def _take_down(self, sampler: subprocess.Popen[str], gpus: int) -> None:
        assert sampler.stdout is not None
        here: list[tuple[str, str]] = []
        for line in sampler.stdout:
            mib, _, percent = line.partition(", ")
            here.append((mib, percent.strip()))
            if len(here) == gpus:
                now = time.monotonic()
                self.memory.append((now, [int(mib) << 20 for mib, _ in here]))
                if all(percent.isdigit() for _, percent in here):  # part of a GPU does not tell
                    self.busy.append((now, [int(percent) for _, percent in here]))
                here = []

    def busy_shares(self, lines: Sequence[Mapping[str, float]]) -> list[float]:
        """Of every GPU over these steps, in percent; none where there is none."""
        spans = [(self.written[int(line["step"])], line["seconds_step"]) for line in lines]
        inside = [
            shares
            for moment, shares in self.busy
            if any(written - seconds < moment < written for written, seconds in spans)
        ]
        return [statistics.fmean(of_one) for of_one in zip(*inside, strict=True)]

    def keep_samples(self) -> None:
        """Writes them to gpu_memory.json: seconds, and MiB of every GPU."""
        if self.memory:
            began = self.memory[0][0]
            samples = [[round(moment - began, 2), *(size >> 20 for size in sizes)] for moment, sizes in self.memory]
            atomic_write_text(self.directory / "gpu_memory.json", json.dumps(samples))

    def most_memory(self, lines: Sequence[Mapping[str, float]], trainers: int | None = None) -> dict[Phase, int]:
        """Bytes of the fullest GPU at the fullest moment of each phase, over these steps. Where engines have GPUs of
        their own, the first `trainers` are the trainer's: of rollouts the others count, else these. A weight update
        ends with the engines' caches in place, as in a rollout: its second half does not count."""
        most: dict[Phase, int] = {}
        for line in lines:
            end = self.written[int(line["step"])]
            for phase in reversed(ORDER):
                seconds = line.get(f"seconds_{phase}", 0.0)
                begin, edge = end - seconds, min(EDGE_S, seconds / 4)
                first, last = begin + edge, end - edge
                if phase is Phase.UPDATE_WEIGHTS:
                    first, last = begin, end - seconds / 2
                where = slice(trainers, None) if phase is Phase.ROLLOUT else slice(trainers)
                inside = [max(sizes[where]) for moment, sizes in self.memory if first < moment < last]
                if inside:
                    most[phase] = max(most.get(phase, 0), *inside)
                end = begin
        return most


@dataclass(frozen=True)
class Row:
    """A figure that was measured beside the planned one."""

    name: str
    measured: float
    planned: Between
    unit: str
    tolerance: float
    """Share of the measured figure that the nearer end of the planned ones may be off."""

    @property
    def off(self) -> float:
        """What the nearer end has too much; 0 where the measured figure lies between both."""
        low, high = sorted((self.planned.best, self.planned.worst))
        return (min(max(self.measured, low), high)) / self.measured - 1

    @property
    def holds(self) -> bool:
        return abs(self.off) <= self.tolerance

    def __str__(self) -> str:
        planned = f"{self.planned.best:.2f} to {self.planned.worst:.2f} ({self.off:+.0%}, allowed {self.tolerance:.0%})"
        verdict = "ok" if self.holds else "FAIL"
        return f"{verdict:4} {self.name:24} {self.measured:8.2f} {self.unit:3} planned {planned}"


def write_task(options: argparse.Namespace) -> None:
    """The slice and its questions, unless they are there from an earlier check."""
    folder: Path = options.directory
    if not (folder / "heldout.jsonl").exists():
        # In a process of its own: it leaves nothing on the GPU.
        alone(write_slice, folder / "slice", options.moe_layers, options.device == "cpu")
        for name, count in (("train", PROMPTS), ("heldout", HELD_OUT_PROMPTS)):
            write_prompts(folder / f"{name}.jsonl", count, longest=24 if options.device == "cpu" else 192)


def write_prompts(path: Path, count: int, longest: int) -> None:
    """Questions of random words, a third of `longest` to `longest` each."""
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(count):
            words = draw.integers(0, 80, draw.integers(longest // 3, longest + 1))
            content = "".join(f" w{word}" for word in words)
            question = {"prompt": [{"role": "user", "content": content}], "label": str(number)}
            file.write(json.dumps(question) + "\n")


def run_flags(options: argparse.Namespace, further: list[str]) -> list[str]:
    """Flags of the run; `further` ones come last and win."""
    folder, gpus = options.directory, options.num_gpus
    given = {
        "recipe": options.recipe,
        "name": options.name or options.recipe,
        "runs-dir": folder,
        "hf-checkpoint": folder / "slice",
        "ref-load": folder / "slice",
        "prompt-data": folder / "train.jsonl",
        "custom-rm-path": "scripts.coin_reward:reward",
        "num-rollout": options.num_rollout,
        "rollout-max-response-len": options.response_len,
        "eval-max-response-len": options.response_len,
        "n-samples-per-eval-prompt": 2,
        "eval-interval": options.interrupt_after or options.num_rollout,
        "save-interval": 1000,
        "actor-num-gpus-per-node": gpus,
        "expert-model-parallel-size": gpus,
    }
    if options.device == "cuda":
        spread = ("rollout-num-gpus-per-engine", "sglang-dp-size", "sglang-ep-size")
        given |= dict.fromkeys(spread, gpus)
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words += ["--eval-prompt-data", "slice", str(folder / "heldout.jsonl")]
    return [*words, "--check-weight-update-equal", *further]


def carry_out_run(options: argparse.Namespace, flags: list[str], watch: Watch) -> Iterator[str]:
    """The run, interrupted and resumed if it is to be; tells what went wrong."""
    log = watch.directory.with_suffix(".log")
    ended = carry_out("the run", train_command(flags), watch, log)
    if watch.struck_at is not None:
        seconds, before = time.monotonic() - watch.struck_at, read_lines(watch.directory)
        print(f"interrupted after step {before[-1]['step']}: ended {seconds:.1f} s later")
        if ended.status != SAVED_STATUS:
            yield f"the interrupted run ended with {ended.status}, not {SAVED_STATUS}: {ended.last_words}"
            return
        resume = [*flags, "--load", str(watch.directory / "checkpoints")]
        ended = carry_out("the run, resumed", train_command(resume), watch, log)
        if not goes_on(before, read_lines(watch.directory), options.num_rollout):
            yield "the resumed run lost or repeated steps"
    if ended.status:
        yield f"the run ended with {ended.status}: {ended.last_words}"


def beside_plan(plan: Plan, watch: Watch, lines: Sequence[Mapping[str, float]]) -> Iterator[Row]:
    """Memory and seconds of the phases that the plan speaks of."""
    assert plan.gpu is not None
    assert plan.time is not None
    planned, cluster = {one.phase: one for one in plan.gpu.phases}, plan.resolved.config.cluster
    trainers = None if cluster.colocate else cluster.actor_num_gpus_per_node
    for phase, most in watch.most_memory(lines, trainers).items():
        if (name := PLANNED.get(phase)) in planned:
            yield Row(
                f"memory in {phase}", most / GIB, Between.exactly(planned[name].total / GIB), "GiB", MEMORY_TOLERANCE
            )
    seconds = plan.time.seconds
    works = {
        Phase.ROLLOUT: with_acceptance(seconds[Work.ROLLOUT], plan, lines),
        Phase.TRAIN: seconds[Work.TRAIN] + seconds[Work.OPTIMIZER],
        Phase.UPDATE_WEIGHTS: seconds[Work.UPDATE_WEIGHTS],
    }
    for phase, expected in works.items():
        measured = statistics.median(line[f"seconds_{phase}"] for line in lines)
        yield Row(f"{phase}", measured, expected, "s", SECONDS_TOLERANCE)


def with_acceptance(planned: Between, plan: Plan, lines: Sequence[Mapping[str, float]]) -> Between:
    """Seconds of a rollout with the drafts that these steps accepted: next to none where weights are random."""
    accepted = [line["draft_accept_length"] for line in lines if "draft_accept_length" in line]
    if not accepted:
        return planned
    steps = size_of(plan.resolved.config, "speculative_num_steps", default=DEFAULT_DRAFT_STEPS)
    best, worst = (
        sum(share**step for step in range(steps + 1)) / statistics.fmean(accepted)
        for share in (DRAFT_ACCEPTANCE.best, DRAFT_ACCEPTANCE.worst)
    )
    return Between(planned.best * best, planned.worst * worst)


def make_plan_here(options: argparse.Namespace, flags: list[str], response: float) -> Plan:
    """The plan on this machine, with its rates where they were measured."""
    resolved = read_recipe(flags)
    machine: Machine = machine_like(resolved, read_machine(options.directory))
    if options.rates is not None:
        machine = machine_as_measured(machine, read_rates(options.rates))
    return make_plan(resolved, machine, on_gpu=True, lengths=Lengths(np.array([response])))


def show_steps(lines: Sequence[Mapping[str, float]]) -> None:
    """A line a step: its phases' seconds, and rates."""
    for line in lines:
        phases = "  ".join(f"{phase} {line[f'seconds_{phase}']:.2f}" for phase in Phase if f"seconds_{phase}" in line)
        parts = " ".join(f"{part} {line[name]:.2f}" for part, name in PARTS.items() if name in line)
        rates = f"weights {line.get('weight_bytes_per_second', 0) / GB:.1f} GB/s to each GPU"
        if held := line.get("max_memory_reserved"):
            rates += f"; {line['max_memory_allocated'] / GIB:.1f} GiB of tensors, {held / GIB:.1f} held, in training"
        rates = f"{line.get('tokens', 0)} tokens; {rates}"
        print(f"step {line['step']}: {line['seconds_step']:.2f} s: {phases} ({parts}); {rates}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe")
    parser.add_argument("--num-gpus", type=int, default=2)
    parser.add_argument("--moe-layers", type=int, default=5)
    parser.add_argument("--num-rollout", type=int, default=6)
    parser.add_argument("--interrupt-after", type=int, default=5, help="step that gets a SIGTERM; 0: none does")
    parser.add_argument("--response-len", type=int, default=256, help="tokens of every response (default: 256)")
    parser.add_argument("--rates", type=Path, help="rates.json of a smoke run here (default: data sheets)")
    parser.add_argument("--directory", type=Path, default=Path("build/check-loop"), help="where everything goes")
    parser.add_argument("--name", help="of the run (default: the recipe's)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options, further = parser.parse_known_args()
    here = len(read_machine(options.directory).gpus)
    if options.device == "cuda" and here < options.num_gpus:
        raise UserError(f"{options.num_gpus} GPUs are needed, and {here} are here; or give --device cpu")
    write_task(options)
    flags = run_flags(options, further)
    watch = Watch(options.directory / (options.name or options.recipe), options.interrupt_after)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.getcwd(), os.environ.get("PYTHONPATH"))))
    with watch.of_gpus(here if options.device == "cuda" else 0):
        wrong = list(carry_out_run(options, flags, watch))
    lines = read_lines(watch.directory)
    show_steps(lines)
    rows: list[Row] = []
    if options.device == "cuda" and (usual := settled(lines, options.interrupt_after)):
        response = statistics.fmean(line["response_length"] for line in usual)
        rows = list(beside_plan(make_plan_here(options, flags, response), watch, usual))
        shares = watch.busy_shares(usual)
        print("busy:", ", ".join(f"GPU {gpu} {share:.0f}%" for gpu, share in enumerate(shares)) or "not told")
    watch.keep_samples()
    print("\n".join([*map(str, rows), *(f"FAIL {sentence}" for sentence in wrong)]))
    return int(bool(wrong) or not all(row.holds for row in rows))


if __name__ == "__main__":
    run_main(main)
