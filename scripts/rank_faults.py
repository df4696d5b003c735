#!/usr/bin/env python3
"""Training ranks that fail, over NCCL or gloo: are they named, in time, and is nothing of the run left?

Each way of failing has a run of its own: two ranks under Ray take a step, and in the next one rank 1 falls asleep, so
that rank 0 waits for it in a collective, or is stopped, or killed. `scripts/check_layouts.py --faults` starts the runs:

    scripts/rank_faults.py WAY DEVICE FOLDER
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from recipe.cluster import trainer_group as trainer
from recipe.cluster.rank_actor import ByteArray
from recipe.messages import StepReport
from recipe.plan.memory import object_store_bytes
from recipe.system.errors import USER_ERROR_STATUS, UserError, run_main

FAULTY_RANK, MICROBATCH = 1, 2
"""The rank fails before this microbatch of its second step."""
WAY = "RECIPE_FAULTY_WAY"
"""The environment's variable that tells the rank how."""
FOLDER = "RECIPE_FAULTY_FOLDER"
"""The one that marks every process of a run."""
TIMEOUT_S = {"cuda": 60, "cpu": 40}
"""Of torch.distributed: ranks that come to a standstill are to be named before."""
SEEN_S = 8.0
"""In which the driver has seen where a rank is."""
RUN_LIMIT_S = 400
LEAVE_LIMIT_S = 30
NAMED = "^error: training rank 1 "
PROCESS = r"\(pid \d+ on \S+\) "


def fall_asleep() -> None:
    time.sleep(3600)


def be_stopped() -> None:
    time.sleep(SEEN_S)
    os.kill(os.getpid(), signal.SIGSTOP)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """What befalls the rank, and what is to be said of it."""

    befall: Callable[[], None]
    told: str
    """After NAMED."""
    within: float
    """Share of the time-out."""


FAULTS = {
    "sleep": Fault(
        fall_asleep, PROCESS + r"got nothing done for \d+ s, in .*\(fall_asleep\); the others wait for it in ", 1
    ),
    "stop": Fault(be_stopped, PROCESS + r"does not answer: .*; last seen in .*\(be_stopped\)", 1),
    "kill": Fault(be_killed, r"died \(", 0.5),
}


class FaultyRank(trainer.RankActor):
    """A rank that may be the one that fails."""

    steps = 0

    def train_step(self, shards: Sequence[ByteArray]) -> StepReport:
        self.steps += 1
        if self.rank == FAULTY_RANK and self.steps == 2:
            from recipe.megatron import step

            step.build_microbatch = failing(step.build_microbatch)
        return super().train_step(shards)


def failing(build_microbatch: Callable) -> Callable:
    """`build_microbatch`, with the failure before call MICROBATCH."""
    good = iter(range(1, MICROBATCH))

    def build(*arguments: Any) -> Any:
        if next(good, None) is None:
            FAULTS[os.environ[WAY]].befall()
        return build_microbatch(*arguments)

    return build


def run_with_fault(flags: str, samples: list) -> None:
    """Two steps, of which the second fails."""
    from recipe.cluster import ray_session
    from recipe.cluster.placement import place
    from recipe.config import resolve

    resolved = resolve(flags.split())
    resolved.config.run_dir.mkdir(parents=True)
    with ExitStack() as stack:
        stack.enter_context(ray_session(resolved.config, object_store_bytes(resolved)))
        ranks = trainer.TrainerGroup(resolved.config, resolved.architecture, place(resolved.config))
        stack.enter_context(ranks)
        ranks.begin_start()
        ranks.finish_start()
        ranks.train_step(samples)
        began = time.monotonic()
        stack.callback(lambda: print(f"ended after {time.monotonic() - began:.1f} s", flush=True))
        ranks.train_step(samples)


def check(device: str, folder: Path) -> Iterator[tuple[str, bool]]:
    """A line for each way of failing, and whether it went as it should. `folder` holds the checkpoint in `hf`."""
    at_a_time = len(FAULTS) if device == "cuda" else 1
    with ThreadPoolExecutor(at_a_time) as pool:
        yield from pool.map(lambda way: outcome(way, device, folder), FAULTS)


def outcome(way: str, device: str, folder: Path) -> tuple[str, bool]:
    """Of a run in which a rank fails in this way."""
    here, mark = Path(__file__).parent, f"{folder}/{way}"
    path = os.pathsep.join(filter(None, (str(here), str(here.parent), os.environ.get("PYTHONPATH"))))
    run = subprocess.Popen(
        [sys.executable, "-m", "rank_faults", way, device, str(folder)],
        env=os.environ | {WAY: way, FOLDER: mark, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said, _ = run.communicate(timeout=RUN_LIMIT_S)
    except subprocess.TimeoutExpired:
        run.kill()
        said, _ = run.communicate()
    left = processes_left(mark)
    names = [f"{process.pid} {process.name()}" for process in left]
    for process in left:
        process.kill()
    return verdict(way, said, run.returncode, names, TIMEOUT_S[device])


def verdict(way: str, said: str, status: int, left: list[str], timeout_s: float) -> tuple[str, bool]:
    """What a run in which a rank failed in this way has come to, and whether it is as it should be."""
    error = re.search(NAMED + FAULTS[way].told + ".*", said, re.MULTILINE)
    after = re.search(r"^ended after ([\d.]+) s$", said, re.MULTILINE)
    seconds = float(after[1]) if after else float("inf")
    holds = bool(error) and seconds < FAULTS[way].within * timeout_s and not left and status == USER_ERROR_STATUS
    told = error[0] if error and holds else f"status {status}, left behind: {left or 'nothing'}\n{said}"
    return f"{way}: after {seconds:.1f} s of at most {timeout_s}: {told}", holds


def processes_left(mark: str) -> list[psutil.Process]:
    """Processes of the run that are still there after some time."""
    deadline = time.monotonic() + LEAVE_LIMIT_S
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(FOLDER) == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def main() -> None:
    way, device, folder = sys.argv[1:]
    from check_layouts import RANKS, SCALES, base_flags, random_samples

    flags = f"{base_flags(Path(folder) / 'hf', device)} --actor-num-gpus-per-node {RANKS}"
    flags += f" --expert-model-parallel-size {RANKS} --moe-permute-fusion --runs-dir {folder} --name {way}"
    flags += f" --distributed-timeout-minutes {TIMEOUT_S[device] / 60}"
    run_with_fault(flags, random_samples(SCALES[device]))
    raise UserError("nothing failed")


if __name__ == "__main__":
    import rank_faults  # Ray's workers find the class by this name

    trainer.RankActor = rank_faults.FaultyRank  # type: ignore[misc]
    run_main(main)
